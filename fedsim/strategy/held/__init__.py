"""What a checkpoint holds of objects that are not fedsim's: a graph as JSON and tensors.

Nothing is pickled and nothing is imported. A class that the text names is looked up among the
modules that the strategy's own code has loaded, and its instances are made without calling it. An
object that has no such form is reported by the attribute that holds it.
"""

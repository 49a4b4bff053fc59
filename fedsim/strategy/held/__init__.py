"""What a checkpoint holds of objects that are not fedsim's: a graph as JSON and tensors.

Nothing is pickled and nothing imported: a class that the text names is looked up among modules that
the strategy's own code has loaded, its instances are made without calling it, and whatever has no
such form is named by where it hangs.
"""

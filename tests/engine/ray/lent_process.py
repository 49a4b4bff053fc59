"""What runs in the process of a lent worker (`lent.py`)."""

from fedsim.engine.worker_process import WorkerProcess


class LentProcess(WorkerProcess):
    """A worker process that can begin anew."""

    def rest(self):
        """Let go of all that the last grid has given."""
        self._runner = self._received = self._line = None
        self._views.clear()

    def ready_anew(self, sign, line, *arguments):
        """As a new process that is made with these arguments and gets ready."""
        self.__init__(*arguments)
        return self.ready(sign, line)

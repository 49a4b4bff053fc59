"""The process's generators are one thread's at a time."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fedsim.basics.generators import put_back, seeded
from tests.laws.federations import make_task


def bits(seed):
    state = make_task("cnn").build_model(seed).state_dict()
    return b"".join(tensor.numpy().tobytes() for tensor in state.values())


def test_models_that_threads_build_at_a_time_are_those_of_their_seeds():
    alone = [bits(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(bits, [*range(4)] * 30)) == alone * 30


def test_what_a_thread_draws_meanwhile_is_put_back_behind_it():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(bits, range(20)))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # from Python 3.12 on
def test_a_forked_process_waits_for_no_thread_that_it_lacks():
    begun, over = threading.Event(), threading.Event()

    def hold():
        with put_back():
            begun.set()
            over.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    begun.wait(30)
    child = os.fork()
    if child == 0:
        with seeded(3):
            os._exit(7)
    over.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7

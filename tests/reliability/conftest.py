import signal

import pytest
import torch


@pytest.fixture(autouse=True)
def hang_ups_arrive():
    """Tests may themselves run under nohup, which has their processes ignore SIGHUP."""
    before = signal.getsignal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(autouse=True)
def one_thread():
    """So that these tests do not depend on the cores of the machine, nor its forks on threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

"""Slices cover everything once; arrays find their module without CuPy being imported."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cupytron import backend


@pytest.mark.parametrize("length", [0, 1, 7, 100])
@pytest.mark.parametrize("block", [0, 1, 7, 1000])
def test_slices_cover_everything_once(length, block):
    seen, slices = np.zeros(length, int), []

    def body(s):
        seen[s] += 1
        slices.append(s)

    backend.for_slices(np, body, length, block)
    assert (seen == 1).all()
    assert len(slices) == backend.slice_count(np, length, block)


def test_other_modules_take_one_slice():
    slices = []
    backend.for_slices(sys, slices.append, 1000, 10)  # any module that is not NumPy
    assert slices == [slice(0, 1000)]
    assert backend.slice_count(sys, 1000, 10) == 1


def test_numpy_arrays_belong_to_numpy():
    assert backend.array_module(np.ones(3)) is np
    assert backend.rows_per_block(10**9) == 1


def test_one_blas_thread_is_given_back_by_the_last_user():
    """Several threads at once, as ranks in threads are: the number must not stay at one."""
    before = [library.get_num_threads() for library in backend._blas()]
    together = threading.Barrier(3)

    def body():
        for _ in range(20):
            together.wait(30)
            with backend.one_blas_thread():
                pass

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(body) for _ in range(3)]:
            done.result()
    assert [library.get_num_threads() for library in backend._blas()] == before
    with backend.one_blas_thread():
        assert all(library.get_num_threads() == 1 for library in backend._blas())
    assert [library.get_num_threads() for library in backend._blas()] == before

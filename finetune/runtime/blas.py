"""Choose how many threads NumPy's BLAS uses for a matrix.

Threads of OpenBLAS spin while they wait for one another. On the embeddings of some thousand images that costs more than the
threads gain, and far more if another process needs the cores, such as the one that mirrors the run to MLflow: on a busy machine
the eigenvectors for novelty detection took 2.7 s of CPU time with two threads and 0.1 s with one.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from threadpoolctl import threadpool_limits

ONE_THREAD_ELEMENTS = 2**25  # 128 MiB of float32; for smaller matrices one thread is faster than several


def blas_threads_for(n_elements: int) -> AbstractContextManager[object]:
    """Return a context that limits BLAS to one thread if the matrices in it have at most `ONE_THREAD_ELEMENTS` elements."""
    return threadpool_limits(1, "blas") if n_elements <= ONE_THREAD_ELEMENTS else nullcontext()

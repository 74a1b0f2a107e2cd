"""Where the arms of a study are measured: here, in processes of this machine, or on a cluster.

An executor is one of ``concurrent.futures`` or of a library that offers the same interface (dask.distributed's
``Client.get_executor()``, submitit's ``AutoExecutor``); ``tenfold.claims.Study`` takes any of them. ``make`` gives the two
that a command line can name.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
from collections.abc import Iterator

from tenfold.errors import UserError, needs

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@contextlib.contextmanager
def make(spec: str | None) -> Iterator[concurrent.futures.Executor | None]:
    """Yield the executor that an option names, and shut it down when the block ends.

    Args:
        spec: ``processes:N`` (N processes of this machine, one thread each), ``dask:ADDRESS`` (the scheduler of a cluster
            whose workers have the same packages), or null: none, so that the caller measures one after another.

    Raises:
        UserError: another form, or no scheduler at that address.
        MissingExtraError: dask without dask.distributed.
    """
    if spec is None:
        yield None
        return
    kind, _, value = spec.partition(":")
    if kind == "processes" and value.isdigit() and int(value) > 0:
        with (
            _one_thread_each(),
            concurrent.futures.ProcessPoolExecutor(
                int(value), mp_context=multiprocessing.get_context("spawn"), initializer=one_thread
            ) as pool,
        ):
            yield pool
    elif kind == "dask" and value:
        needs("distributed", "dask", why=f"--executor {spec}")
        from distributed import Client

        try:
            client = Client(value, timeout="10s")  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            raise UserError(f"--executor {spec}: no scheduler of dask answers there ({error})") from error
        with client, client.get_executor(pure=False) as cluster:  # type: ignore[no-untyped-call]
            yield cluster
    else:
        raise UserError(f"--executor {spec}: expected processes:N with N of 1 or more, or dask:ADDRESS")


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes that start within the block compute with one thread, also in libraries that read it as they load."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def one_thread() -> None:
    """Let torch compute with one thread in this process, where it is loaded or can be."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)

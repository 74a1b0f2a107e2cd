"""Several processes: the pipeline, and DDP over gloo."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from localrecon import PipelineTrainer, SGRConfig, StepOptions, local_step
from localrecon.passes import NonFiniteLossError

from tenfold import UserError

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def functions():
    """The functions that are sent to workers, importable by name there too."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    sys.path.insert(0, str(HERE))
    import worker_functions

    yield worker_functions
    sys.path.remove(str(HERE))


def batches(count):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)) for _ in range(count)]


def test_a_pipeline_of_two_processes_is_one_process_bit_for_bit(functions):
    """20 steps, with reconciliation, dropout and BatchNorm."""
    sgr = SGRConfig(ramp=0, gate=True)
    alone = functions.net_with_dropout()
    optimizers = [functions.sgd(alone.parameters_of(k)) for k in range(3)]
    data = batches(20)
    losses = [
        local_step(alone, x, y, optimizers, sgr, StepOptions(step=t, seed=4)).losses for t, (x, y) in enumerate(data)
    ]
    net = functions.net_with_dropout()
    with PipelineTrainer(net, functions.sgd, sgr, StepOptions(seed=4), workers=2) as trainer:
        found = [report.losses for report in trainer.steps(data[:15])]
        found += [report.losses for report in trainer.steps(data[15:])]
        trainer.collect()
        assert found == losses
        assert all(
            torch.equal(a, b) for a, b in zip(alone.state_dict().values(), net.state_dict().values(), strict=True)
        )
        assert [s.loss_average for s in net.segments] == [s.loss_average for s in alone.segments]
        with pytest.raises(NonFiniteLossError, match="module 1"):
            list(trainer.steps([(torch.full((8, 6), float("nan")), data[0][1])]))


def test_a_worker_that_dies_is_an_error_here_and_no_hang(functions):
    net = functions.net_with_dropout()
    with (
        PipelineTrainer(net, functions.dying, workers=1, timeout=60) as trainer,
        pytest.raises(RuntimeError, match="exit code 7"),
    ):
        list(trainer.steps(itertools.islice(itertools.cycle(batches(1)), 10)))


def test_pipelines_that_cannot_be_are_refused(functions):
    net = functions.net_with_dropout()
    with pytest.raises(UserError, match="workers must be 1 to 3"):
        PipelineTrainer(net, functions.sgd, workers=4)
    with pytest.raises(UserError, match="2 workers need as many devices"):
        PipelineTrainer(net, functions.sgd, workers=2, devices=["cpu"])
    with pytest.raises(UserError, match="queue"):
        PipelineTrainer(net, functions.sgd, queue=0)


def test_two_ranks_are_one_process_with_the_whole_batch(tmp_path):
    """Every estimator, and one all-reduce per parameter and step."""
    assert importlib.util.find_spec("torch.distributed")
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(HERE / "ranks_run.py"), str(tmp_path / "meeting")],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)

"""One rank of the two-process test: ``python ranks_run.py PROJECT OUT`` under torchrun's environment."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.append(str(Path(__file__).parent))

import head_kd.ops_fallback  # noqa: F401
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.model import MMDistributedDataParallel
from tiny_detectors import STUDENTS, batch_for, teacher_config, total, wrap

project, out = map(Path, sys.argv[1:])
torch.set_num_threads(1)
register_all_modules(init_default_scope=True)
dist.init_process_group("gloo")
rank = int(os.environ["RANK"])
teacher = {"config": Config({"model": teacher_config()}), "checkpoint": str(project / "teacher.pth")}


def fresh():
    model = wrap(
        STUDENTS["retinanet"], assistants=[{"kind": "roi", "normalize": True, "ckd_on": "positive"}], teacher=teacher
    )
    model.backbone.eval()
    return model


model = fresh()
wrapped = MMDistributedDataParallel(model, find_unused_parameters=False, broadcast_buffers=False)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
grads = {}
for step in range(2):
    images, samples = batch_for(model, 2, 10 * rank + step, truth="none" if rank == 1 and step == 1 else None)
    losses = wrapped(images, samples, mode="loss")
    optimizer.zero_grad()
    total(model, losses).backward()
    if step == 0:
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.backbone.eval()
    optimizer.step()
saved = {"state": model.state_dict(), "grads": grads}
dist.barrier()
if rank == 0:
    # the same two batches in one process, each with the sampling stream of its rank
    import head_kd.detector as detector

    alone = {}
    reference = fresh()
    for other in range(2):
        detector.get_rank = lambda other=other: other
        from mmdet.models.dense_heads import base_dense_head  # noqa: F401

        images, samples = batch_for(reference, 2, 10 * other)
        reference.head_kd.step.zero_()
        # average factors of the losses are reduced over ranks by mmdet itself
        loss = total(reference, reference.loss(images, samples))
        for name, value in zip(
            [n for n, _ in reference.named_parameters()],
            torch.autograd.grad(loss, list(reference.parameters())),
            strict=True,
        ):
            if name.startswith("head_kd"):
                alone[name] = alone.get(name, 0) + value / 2
    saved["alone"] = alone
torch.save(saved, out / f"rank{rank}.pt")
dist.destroy_process_group()

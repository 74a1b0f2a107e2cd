import torch
from torch import nn

from tenfold.memory import MemoryProbe, tensors_in


def test_storages_count_once_and_no_longer_than_they_live():
    """Against sizes computed by hand."""
    a = torch.zeros(1000)
    with MemoryProbe(a) as probe:
        b = a + 1  # 4000
        c = b.view(10, 100)[:5]  # the same storage
        d = torch.ones(500)  # 2000
        del d
        e = b * 2  # 4000
        assert probe.live_bytes == 12000
    assert (probe.start_bytes, probe.peak_bytes) == (4000, 12000)
    assert c.shape == (5, 100)
    assert e.shape == (1000,)


def test_what_backward_keeps_is_counted():
    x = torch.randn(100, requires_grad=True)
    with MemoryProbe(x) as probe:
        y = x.exp()  # keeps its result, 400
        z = y.sin()  # keeps its input, the same 400
        loss = (z * z).sum()  # keeps z, 400
        assert probe.saved_bytes == 800
        loss.backward()
    assert probe.saved_bytes == 800
    assert x.grad is not None


def test_tensors_are_found_in_what_people_have():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 3)).sum().backward()
    optimizer.step()
    found = list(tensors_in([{"a": model}, optimizer, (torch.zeros(5),)]))
    assert len(found) == 4 + 6 + 1  # two weights with gradients; their three states each; one tensor

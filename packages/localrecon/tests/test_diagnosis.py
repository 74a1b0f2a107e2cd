import pytest
import torch
import torch.nn.functional as F
from localrecon import HeadSpec, LocalNet, SGRConfig, diagnose, plan_split
from localrecon.commands._learning import digits, fit
from localrecon.models import convnet
from localrecon_test_nets import convs, images, mlp, same, split, vectors, weights


def test_its_numbers_are_those_of_plain_autograd():
    x, y = vectors(dtype=torch.float64)
    net = split(mlp().double(), x, 2)
    report = diagnose(net, x, y)
    model, head = net.model, net.heads[0]
    a = model[1](model[0](x))
    loss = F.cross_entropy(head(a), y)
    (g_out,) = torch.autograd.grad(loss, a, retain_graph=True)
    leaf = a.detach().requires_grad_()
    last = F.cross_entropy(model[4](model[3](model[2](leaf))), y)
    (g_in,) = torch.autograd.grad(last, leaf)
    boundary = report.boundaries[0]
    assert boundary.gap == pytest.approx(float((g_in - g_out).norm() / g_out.norm()))
    assert boundary.cosine == pytest.approx(float(F.cosine_similarity(g_in, g_out, dim=1).mean()))
    early = [*model[0].parameters(), *model[1].parameters()]

    def flat(grads):
        return torch.cat([g.flatten() for g in grads])

    ours = flat(torch.autograd.grad(a, early, g_out, retain_graph=True))
    theirs = flat(torch.autograd.grad(a, early, g_in, retain_graph=True))
    assert boundary.certificate == pytest.approx(float(F.cosine_similarity(ours, theirs, dim=0)))
    late = [p for i in (2, 3, 4) for p in model[i].parameters()]
    local = torch.cat([ours, flat(torch.autograd.grad(F.cross_entropy(model[2:](a.detach()), y), late))])
    whole = flat(torch.autograd.grad(F.cross_entropy(model(x), y), [*early, *late]))
    assert report.bp_alignment == pytest.approx(float(F.cosine_similarity(local, whole, dim=0)))
    assert report.losses == pytest.approx([float(loss.detach()), float(last.detach())])


def test_it_changes_nothing():
    x, y = images()
    net = split(convs(), x, 2).eval()
    before, state = weights(net), torch.get_rng_state()
    report = diagnose(net, x, y)
    assert same(before, weights(net))
    assert torch.equal(state, torch.get_rng_state())
    assert not net.training
    assert "| 2 |" in report.to_markdown()
    assert report.boundaries[0].pooled_cosine != report.boundaries[0].cosine


def test_modules_that_copy_weak_heads_are_flagged():
    """Networks that learn: a large pull to weak heads collapses (demonstration D2) and is flagged, the default is neither."""
    x, y, *_ = digits(100)

    def trained(sgr):
        torch.manual_seed(0)
        model = convnet(1, 10, width=16, depth=6)
        net = LocalNet(
            model, plan_split(model, x[:64], k=6, balance="blocks", measure=False), HeadSpec(kind="gap_linear")
        )

        def draw(generator):
            rows = torch.randint(len(x), (64,), generator=generator)
            return x[rows], y[rows]

        fit(net, draw, 60, sgr, 0)
        report = diagnose(net, x, y)
        return report.accuracies[-1], any("copy the head before" in warning for warning in report.warnings)

    collapsed, flagged = trained(SGRConfig(dist="relative"))
    healthy, unflagged = trained(SGRConfig())
    assert flagged
    assert not unflagged
    assert collapsed < healthy

"""RadioGAT over tiles and from official weights; RadioGATx against inverse distances by a loop; labels that do not leak."""

import numpy as np
import pytest
import torch
from radiogat.baselines import IDW, LocalKriging
from radiogat.config import CityConfig, GraphConfig, RadioGATConfig, RadioGATxConfig
from radiogat.graph import blocks, build_graph
from radiogat.networks import RadioGAT, node_features, tiled_radiogat
from radiogat.samples import RadioSamples
from radiogat.simulate import city
from radiogat.tasks import BlockTask, HeldoutLabelSampler, NeighborTask, run_task

from tenfold import NonFiniteError, UserError
from tenfold.testing import assert_gradient_isolated


def tilted(network):
    """Weights that an untrained network does not have: every part counts."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return network


@pytest.mark.parametrize("head", ["direct", "spectral"])
def test_radiogatx_starts_at_inverse_distance_weighting(town, measured, head):
    """Weights (d + 1/2)^-2 in cells, on values with free space taken off, by an independent loop."""
    task = NeighborTask(measured, town.scene, RadioGATxConfig(head=head))
    xy = town.scene.grid.centers()[::97][:60]
    f = np.resize(np.array(town.freq_mhz), len(xy))
    found, _ = task.predict(xy, f)
    f0 = np.prod(town.freq_mhz) ** (1 / 3)
    for place, freq, power in zip(xy, f, found, strict=True):
        d = np.sqrt(((measured.xy - place) ** 2).sum(axis=1)) / town.cell
        near = np.lexsort((np.arange(len(d)), d))[:16]
        weight = (d[near] + 0.5) ** -2
        value = measured.rss_dbm[near] + 20 * np.log10(measured.freq_mhz[near] / f0)
        expected = (weight * value).sum() / weight.sum() - 20 * np.log10(freq / f0)
        assert power == pytest.approx(expected, abs=2e-5)


def test_a_constant_added_to_all_measurements_is_added_to_the_prediction(town, measured):
    louder = RadioSamples(measured.xy, measured.freq_mhz, measured.rss_dbm + 7.5)
    xy, f = town.scene.grid.centers()[::53], np.full(len(town.scene.grid.centers()[::53]), 1750.0)
    one, other = (NeighborTask(s, town.scene, RadioGATxConfig()) for s in (measured, louder))
    tilted(one.network)
    other.network.load_state_dict(one.network.state_dict())
    assert np.allclose(other.predict(xy, f)[0], one.predict(xy, f)[0] + 7.5, atol=1e-4)


def test_the_order_of_measurements_does_not_matter(town, measured):
    """No two measurements are equally far, since ties go by the order of the file."""
    moved = measured.xy + np.random.default_rng(1).uniform(-1, 1, measured.xy.shape)
    moved = RadioSamples(moved, measured.freq_mhz, measured.rss_dbm)
    order = np.random.default_rng(0).permutation(len(moved))
    one, other = (NeighborTask(s, town.scene, RadioGATxConfig()) for s in (moved, moved.take(order)))
    other.network.load_state_dict(tilted(one.network).state_dict())
    xy = town.scene.grid.centers()[::53]
    f = np.full(len(xy), 3500.0)
    assert np.allclose(one.predict(xy, f)[0], other.predict(xy, f)[0], atol=1e-4)


def test_with_all_measurements_as_neighbors_the_order_of_the_file_does_not_matter(town, measured):
    few = measured.take(np.arange(0, len(measured), 90))
    config = RadioGATxConfig(neighbors=len(few) - 1)
    order = np.random.default_rng(0).permutation(len(few))
    one, other = (NeighborTask(s, town.scene, config) for s in (few, few.take(order)))
    for task in (one, other):
        task.neighbors = len(few)
    other.network.load_state_dict(tilted(one.network).state_dict())
    xy = town.scene.grid.centers()[::311]
    f = np.full(len(xy), 3500.0)
    assert np.allclose(one.predict(xy, f)[0], other.predict(xy, f)[0], atol=2e-4)


def test_a_constant_field_stays_constant(town):
    rng = np.random.default_rng(0)
    flat = RadioSamples(rng.uniform(0, 100, (80, 2)), 1750.0, np.full(80, -61.25))
    xy = rng.uniform(0, 100, (50, 2))
    for method in (IDW(), LocalKriging()):
        assert np.allclose(method.fit(flat).predict(xy, 1750.0), -61.25, atol=1e-5)
    assert np.allclose(
        NeighborTask(flat, None, RadioGATxConfig()).predict(xy, np.full(50, 1750.0))[0], -61.25, atol=1e-5
    )


def test_the_spectral_head_is_a_line_over_log_frequency(town, measured):
    task = NeighborTask(measured, town.scene, RadioGATxConfig())
    tilted(task.network)
    xy = town.scene.grid.centers()[::97]
    power = [task.predict(xy, np.full(len(xy), f))[0] for f in (1000.0, 3000.0, 9000.0)]
    assert np.allclose(power[1] - power[0], power[2] - power[1], atol=1e-3)  # equal steps of log f
    assert not np.allclose((power[2] - power[0]) / np.log10(9), -20, atol=0.1)


def test_errors_of_the_scale_do_not_reach_the_power(town, measured):
    task = NeighborTask(measured, town.scene, RadioGATxConfig())
    tilted(task.network)
    _, scale = task.network(*task._batch(np.arange(50)))
    heads = list(task.network.scale.parameters())
    assert_gradient_isolated(
        scale.sum(), reaches=heads, spares=[*task.network.edge.parameters(), task.network.delta.weight]
    )


@pytest.mark.filterwarnings("ignore:.*measured several times")
def test_leave_one_out_never_finds_the_target_even_among_equal_places():
    rng = np.random.default_rng(0)
    places = rng.integers(0, 12, (90, 2)).astype(float)
    freq = np.resize([1750.0, 3500.0, 5750.0], 90)
    samples = RadioSamples(places, freq, rng.normal(-60, 5, 90), conflict=100.0)
    rows = np.arange(len(samples))
    task = NeighborTask(samples, None, RadioGATxConfig(neighbors=8))
    for radius in (0.0, 2.0):
        distance, index = task.donors(rows, np.full(len(rows), radius))
        apart = np.sqrt(((samples.xy[index] - samples.xy[:, None]) ** 2).sum(axis=2))
        assert np.allclose(apart, distance)
        assert distance.min() > radius
        for row in rows[::9]:
            d = np.sqrt(((samples.xy - samples.xy[row]) ** 2).sum(axis=1))
            assert np.allclose(distance[row], np.sort(d[d > radius])[:8])


def test_the_correction_is_bounded_outside_of_what_was_trained(town, measured):
    """Far away the network departs no farther from its weighted mean than any training target did, however it was tilted."""
    xy = np.array([[-5e4, 9e4], [3e5, 3e5]])
    for head, spectral in (("direct", 0.0), ("spectral", 40.0)):
        task = NeighborTask(measured, town.scene, RadioGATxConfig(head=head))
        for parameter in tilted(task.network).parameters():
            parameter.data.mul_(50)
        power, _ = task.predict(xy, np.full(2, 1750.0))
        decades = np.log10(1750.0 / task.hoods.reference_mhz)
        bound = float(task.network.limit) + spectral * abs(decades) + 1e-3
        assert 0 < bound < 100
        assert (power + 20 * decades <= task.hoods.values().max() + bound).all()
        assert (power + 20 * decades >= task.hoods.values().min() - bound).all()


def gat_task(labels="heldout", seed=100, **settings):
    maps = city(CityConfig(size=80, freq_mhz=(1750.0, 5750.0), seed=seed))
    observed = maps.draw(0.1, 0)
    config = RadioGATConfig(labels=labels, widths=(8, 12), epochs=2, **settings)
    pairs = [(0, 0), (1, 1)]
    known = (maps.building, maps.scene.depth, maps.rss_dbm, observed, maps.freq_mhz)
    return maps, BlockTask(*known, pairs, blocks((80, 80)), config)


@pytest.mark.parametrize(("labels", "leaks"), [("heldout", False), ("observed", True)])
def test_a_heldout_label_does_not_reach_its_own_prediction(labels, leaks):
    """Changing a target's value changes the prediction there only when the labels are the inputs."""
    _, task = gat_task(labels, dropout=0.0)
    window = task.windows[0]
    observed = task.observed[0][window]
    visible, targets = HeldoutLabelSampler(observed, 0).draw(0) if labels == "heldout" else (observed, observed)
    row, column = np.argwhere(targets)[0]
    graph = task.block_graph(window).adjacency(1750)
    predicted = []
    for value in (-50.0, -90.0):
        task.rss_dbm[0][window][row, column] = value
        out = np.full(targets.shape, np.nan)
        with torch.no_grad():
            out[~task.building[window]] = task.forward(window, visible, (0, 0), [graph, graph]).numpy()
        predicted.append(out[row, column])
    assert (predicted[0] != predicted[1]) == leaks


def test_the_sampler_splits_what_was_observed():
    observed = np.random.default_rng(0).random((40, 40)) < 0.3
    sampler = HeldoutLabelSampler(observed, 5)
    shares = []
    for step in range(60):
        visible, targets = sampler.draw(step)
        assert not (visible & targets).any()
        assert np.array_equal(visible | targets, observed)
        shares.append(targets.sum() / observed.sum())
    assert 0.25 < min(shares) < 0.4 < 0.6 < max(shares) < 0.75
    assert np.array_equal(sampler.draw(7)[0], HeldoutLabelSampler(observed, 5).draw(7)[0])


@pytest.mark.parametrize("labels", ["observed", "heldout", "full"])
def test_training_lowers_the_loss_of_a_fixed_batch_and_repeats(labels):
    ends = []
    for _ in range(2):
        _, task = gat_task(labels, dropout=0.0)
        optimizer = torch.optim.Adam(task.network.parameters(), lr=1e-3)
        losses = []
        for _ in range(6):
            loss = task.loss(3)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        ends.append(task.network.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_training_radiogatx_lowers_the_loss_and_repeats(town, measured):
    ends = []
    for _ in range(2):
        task = NeighborTask(measured, town.scene, RadioGATxConfig(steps=40))
        before = np.mean([task.loss(step).item() for step in range(4)])
        run_task(task)
        assert np.mean([task.loss(step).item() for step in range(4)]) < before
        ends.append(task.network.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_loss_that_is_not_finite_names_the_step(town, measured):
    task = NeighborTask(measured, town.scene, RadioGATxConfig(steps=3))
    with torch.no_grad():
        task.network.delta.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="RadioGATx: the loss is nan at step 0"):
        run_task(task)


def test_tiles_with_halo_equal_the_whole_graph():
    """With two thirds of the halo they do not."""
    maps = city(CityConfig(size=200, seed=100, freq_mhz=(1750.0, 5750.0)))
    observed = maps.draw(0.1, 0)[0]
    network = tilted(RadioGAT(RadioGATConfig(widths=(8, 12)))).eval()
    scene = maps.scene
    arguments = (network, maps.building, scene.depth, observed, np.nan_to_num(maps.rss_dbm[0]), 1750.0, 5750.0)
    loose = GraphConfig(delta=2.0)  # edges that reach as far as they can
    graph = build_graph(maps.building, scene.depth, loose)
    x = node_features(graph.street, observed, np.nan_to_num(maps.rss_dbm[0]), 1750.0, 5750.0)
    with torch.no_grad():
        whole = network(x, graph.adjacency(1750.0), graph.adjacency(5750.0)).numpy()
    for halo, equal in ((None, True), (9, False)):
        found = tiled_radiogat(*arguments, loose, tile=64, halo=halo)
        difference = np.abs(found[graph.street] - whole).max()
        assert (difference < 1e-6 * np.abs(whole).max() * 10) == equal, difference
    assert np.isnan(found[maps.building]).all()


def test_official_weights_load_and_their_fourth_layer_is_ignored():
    sizes = {"conv1": (5, 80), "conv2": (80, 320), "conv3": (320, 1), "conv4": (5, 80)}
    torch.manual_seed(0)
    state = {}
    for name, (inputs, outputs) in sizes.items():
        state[f"{name}.weight_w"] = torch.randn(inputs, outputs)
        state[f"{name}.weight_a"] = torch.randn(2 * outputs, 1)
        state[f"{name}.bias"] = torch.randn(outputs, 1)
    network = RadioGAT.from_official(state)
    assert torch.equal(network.conv2.weight, state["conv2.weight_w"])
    assert torch.equal(network.conv1.source, state["conv1.weight_a"][80:])
    assert torch.equal(network.conv3.bias, state["conv3.bias"].ravel())
    with pytest.raises(UserError, match=r"no conv3\.bias"):
        RadioGAT.from_official({k: v for k, v in state.items() if k != "conv3.bias"})
    with pytest.raises(UserError, match=r"conv1: weight_w \(5, 8\)"):
        RadioGAT.from_official(state | {"conv1.weight_w": torch.randn(5, 8)})


def test_features_are_the_five_columns_of_the_authors_and_a_flag():
    street = np.array([[True, False], [True, True]])
    observed = np.array([[True, True], [False, True]])
    rss = np.array([[-50.0, -60.0], [-70.0, -80.0]])
    x = node_features(street, observed, rss, 1750.0, 5750.0, origin=(40, 80), whole=(80, 160))
    f = 1750 / 5750
    expected = [[0.5, 0.5, f, 1.0, 0.5, 1], [41 / 80, 0.5, f, 1, 0, 0], [41 / 80, 81 / 160, f, 1, 0.8, 1]]
    assert torch.allclose(x, torch.tensor(expected))
    assert node_features(street, observed, rss, 1750.0, 5750.0, flag=False).shape == (3, 5)

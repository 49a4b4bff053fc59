import math

import networkx as nx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedsim.basics.errors import ScenarioError
from fedsim.federation.topology.kinds import (  # fmt: skip
    complete,
    erdos_renyi,
    file,
    from_edges,
    line,
    regular,
    ring,
    small_world,
    star,
    torus,
)
from fedsim.federation.topology.mixing import mixing_matrix, spectral_gap
from fedsim.federation.topology.named import TOPOLOGIES
from fedsim.federation.topology.picture import draw_topology
from fedsim.federation.topology.topology import graph_statistics
from fedsim.scenario import signatures

PLAIN = [kind for kind in TOPOLOGIES if kind != "file"]
RANDOM = ["regular", "erdos_renyi", "small_world", "barabasi_albert"]


def drawn(topology, num_nodes, *, server_round=1, seed=5):
    return topology.graph(num_nodes, server_round=server_round, seed=seed)


def edges(topology, num_nodes, **options):
    return sorted(drawn(topology, num_nodes, **options).edges)


# --- the kinds ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("num_nodes", [12, 30])
def test_every_kind_is_a_connected_simple_graph_of_numbered_nodes(kind, num_nodes):
    graph = drawn(TOPOLOGIES[kind](), num_nodes)
    assert list(graph) == list(range(num_nodes))
    assert not graph.is_directed()
    assert not graph.is_multigraph()
    assert not nx.number_of_selfloops(graph)
    assert nx.is_connected(graph)
    with pytest.raises(nx.NetworkXError, match="Frozen"):
        graph.add_edge(0, 1)


def test_the_fixed_kinds_have_the_edges_of_their_name():
    assert edges(ring(), 4) == [(0, 1), (0, 3), (1, 2), (2, 3)]
    assert edges(line(), 4) == [(0, 1), (1, 2), (2, 3)]
    assert edges(star(), 4) == [(0, 1), (0, 2), (0, 3)]
    assert len(edges(complete(), 7)) == 21
    assert set(dict(drawn(torus(), 12).degree).values()) == {4}
    assert nx.is_isomorphic(drawn(torus(), 12), nx.grid_2d_graph(3, 4, periodic=True))
    assert edges(torus(), 4) == [(0, 1), (0, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize("kind", ["ring", "line", "star", "complete"])
def test_one_node_has_no_neighbour_and_two_nodes_have_one(kind):
    assert edges(TOPOLOGIES[kind](), 1) == []
    assert edges(TOPOLOGIES[kind](), 2) == [(0, 1)]


def test_the_random_kinds_have_what_their_arguments_say():
    assert {d for _, d in drawn(regular(degree=5), 20).degree} == {5}
    assert edges(regular(degree=1, connected=False), 2) == [(0, 1)]
    share = np.mean([len(edges(erdos_renyi(probability=0.4), 40, seed=s)) for s in range(30)])
    assert share / 780 == pytest.approx(0.4, abs=0.02)
    assert edges(small_world(degree=2, rewiring=0.0), 9) == edges(ring(), 9)
    rewired = set(edges(small_world(rewiring=0.3), 200)) - set(edges(small_world(rewiring=0), 200))
    assert len(rewired) / 400 == pytest.approx(0.3, abs=0.06)
    degrees = [d for _, d in drawn(TOPOLOGIES["barabasi_albert"](attachments=3), 300).degree]
    assert min(degrees) == 3
    assert max(degrees) > 30


@pytest.mark.parametrize("kind", RANDOM)
def test_a_random_graph_is_a_function_of_seed_and_epoch_alone(kind):
    topology = TOPOLOGIES[kind]()
    first = edges(topology, 20)
    for server_round in (7, 100):
        assert edges(topology, 20, server_round=server_round) == first
    for seed in range(10):  # push the first graph out of the cache
        edges(topology, 20, seed=100 + seed)
    assert edges(topology, 20) == edges(TOPOLOGIES[kind](), 20) == first
    assert len({tuple(edges(topology, 20, seed=seed)) for seed in range(10)}) == 10


@pytest.mark.parametrize("kind", RANDOM)
def test_a_random_graph_is_drawn_anew_every_so_many_rounds(kind):
    topology = TOPOLOGIES[kind](every=3)
    found = [tuple(edges(topology, 20, server_round=t)) for t in range(1, 10)]
    assert len(set(found)) == 3
    assert all(len(set(found[start : start + 3])) == 1 for start in (0, 3, 6))
    assert tuple(edges(TOPOLOGIES[kind](), 20)) == found[0]


def test_rounds_of_an_epoch_share_graph_and_neighbours():
    topology = regular(every=2)
    assert drawn(topology, 10) is drawn(topology, 10, server_round=2)
    near = topology.neighbours(10, server_round=1, seed=5)
    assert near is topology.neighbours(10, server_round=2, seed=5)
    graph = drawn(topology, 10)
    assert [found.tolist() for found in near] == [sorted(graph[node]) for node in range(10)]
    assert {found.dtype for found in near} == {np.dtype(np.int64)}


# --- connectivity ---------------------------------------------------------------------------


def test_a_graph_that_falls_into_pieces_is_drawn_again():
    whole, first = erdos_renyi(probability=0.15), erdos_renyi(probability=0.15, connected=False)
    pieces = [graph_statistics(drawn(first, 20, seed=seed))["components"] for seed in range(20)]
    assert max(pieces) > 1
    for seed in range(20):
        assert nx.is_connected(drawn(whole, 20, seed=seed))
        if pieces[seed] == 1:
            assert edges(whole, 20, seed=seed) == edges(first, 20, seed=seed)


def test_a_graph_that_never_comes_out_in_one_piece_is_refused():
    message = r"\[topology\] connected = true: 100 draws of erdos_renyi with 50 nodes .* connected"
    with pytest.raises(ScenarioError, match=message):
        drawn(erdos_renyi(probability=0.01), 50)
    with pytest.raises(ScenarioError, match=r"100 draws of regular with 4 nodes .* into 2;"):
        drawn(regular(degree=1), 4)


def test_pairs_that_change_every_round_may_be_apart_in_each():
    pairs = regular(degree=1, every=1, connected=False)
    union = nx.compose_all([drawn(pairs, 8, server_round=t) for t in range(1, 9)])
    assert nx.is_connected(union)


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("regular", {"degree": 0}, "degree = 0: must be >= 1"),
        ("small_world", {"degree": 3}, "degree = 3: must be even and >= 2"),
        ("small_world", {"rewiring": 1.1}, r"rewiring = 1.1: must be in \[0, 1\]"),
        ("erdos_renyi", {"probability": 0.0}, r"probability = 0.0: must be in \(0, 1\]"),
        ("barabasi_albert", {"attachments": 0}, "attachments = 0: must be >= 1"),
        *((kind, {"every": 0}, "every = 0: must be >= 1") for kind in RANDOM),
    ],
)
def test_impossible_arguments_are_refused(kind, arguments, message):
    with pytest.raises(ScenarioError, match=rf"^\[topology\] {message}$"):
        TOPOLOGIES[kind](**arguments)


@pytest.mark.parametrize(
    ("topology", "num_nodes", "message"),
    [
        (regular(degree=5), 5, "degree = 5 with 5 nodes: must be at most 4, and even as .* odd"),
        (regular(degree=3), 9, "degree = 3 with 9 nodes: must be at most 8, and even"),
        (regular(degree=6), 6, "degree = 6 with 6 nodes: must be at most 5$"),
        (small_world(degree=6), 6, "degree = 6 with 6 nodes: must be at most 4$"),
        (TOPOLOGIES["barabasi_albert"](attachments=3), 3, "attachments = 3 with 3 nodes: .* 2$"),
        (torus(), 13, 'kind = "torus" with 13 nodes: .*nearest: 12 or 14'),
        (torus(), 1, 'kind = "torus" with 1 nodes: .*nearest: 4'),
        (from_edges([(0, 1), (2, 5)]), 5, r"edges: \(2, 5\) names node 5: must be in 0..4"),
    ],
)
def test_impossible_numbers_of_nodes_are_refused(topology, num_nodes, message):
    for refuse in (topology.check, lambda n: drawn(topology, n)):
        with pytest.raises(ScenarioError, match=rf"^\[topology\] {message}"):
            refuse(num_nodes)


@pytest.mark.parametrize("kind", PLAIN)
def test_possible_numbers_of_nodes_are_not_refused(kind):
    assert TOPOLOGIES[kind]().check(16) is None


@pytest.mark.parametrize("kind", TOPOLOGIES)
def test_the_arguments_are_a_scenario_schema(kind):
    schema = signatures.keys(TOPOLOGIES[kind])
    assert all(key.description for key in schema.values())
    given_ = {"path": "graph.txt"} if kind == "file" else {}
    checked = signatures.check(TOPOLOGIES[kind], given_, where="[topology]")
    assert checked.keys() == schema.keys()


# --- edge lists -----------------------------------------------------------------------------


def test_a_file_holds_one_edge_per_line(tmp_path):
    place = tmp_path / "graph.txt"
    place.write_text("# two of three\n0 1\n\n  2\t1  # with a comment\n1 0\n", encoding="utf-8")
    topology = file(path=str(place))
    assert edges(topology, 4) == [(0, 1), (1, 2)]
    assert graph_statistics(drawn(topology, 4)) == {
        "nodes": 4, "edges": 2, "degree": {"min": 0, "mean": 1.0, "max": 2}, "components": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 1\n1 2 3\n", "line 2: '1 2 3': must be two node numbers"),
        ("0 1\n\n# x\n1 two # y\n", "line 4: '1 two # y': must be two node numbers"),
        ("0 -1\n", "line 1: '0 -1': must be two node numbers"),
        ("0 1\n2 2\n", "line 2: joins a node with itself"),
        ("# nothing\n", ": has no edge"),
        ("0 1\n3 1\n", "line 2 names node 3: must be in 0..2"),
    ],
)
def test_a_file_that_is_no_graph_is_refused_with_its_line(tmp_path, text, message):
    place = tmp_path / "graph.txt"
    place.write_text(text, encoding="utf-8")
    with pytest.raises(ScenarioError, match=rf"^\[topology\] path = '.*graph.txt'.*{message}$"):
        drawn(file(path=str(place)), 3)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ScenarioError, match=r"path = 'nowhere.txt': cannot be read: No such file"):
        file(path="nowhere.txt")
    (tmp_path / "image").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ScenarioError, match="cannot be read: is not text"):
        file(path=str(tmp_path / "image"))


def test_edge_lists_take_turns():
    topology = from_edges([(1, 0)], [(1, 2)], every=2)
    found = [edges(topology, 3, server_round=t) for t in range(1, 7)]
    assert found == [[(0, 1)]] * 2 + [[(1, 2)]] * 2 + [[(0, 1)]] * 2
    assert edges(from_edges([]), 3, server_round=4) == []
    for bad, message in (([(1, 1)], "joins a node with itself"), ([(-1, 0)], "numbered from 0")):
        with pytest.raises(ScenarioError, match=message):
            from_edges(bad)


# --- weights --------------------------------------------------------------------------------


@given(
    st.integers(1, 25), st.floats(0, 1), st.sampled_from(["uniform", "metropolis"]),
    st.floats(0, 1), st.integers(0, 99),
)  # fmt: skip
def test_mixing_matrices_are_stochastic_on_the_graph(num_nodes, density, mixing, beta, seed):
    graph = nx.gnp_random_graph(num_nodes, density, seed=seed)
    matrix = mixing_matrix(graph, mixing=mixing, self_weight=beta)
    assert matrix.min() >= 0
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-14)
    off = matrix - np.diag(np.diag(matrix))
    assert not off[nx.to_numpy_array(graph, nodelist=range(num_nodes)) == 0].any()
    isolated = [node for node in graph if not graph[node]]
    assert (np.diag(matrix)[isolated] == 1).all()
    joined = [node for node in graph if graph[node]]
    if mixing == "metropolis":
        assert np.array_equal(matrix, matrix.T)
        assert (np.diag(matrix) > 0).all()
        expected = {(i, j): 1 / (1 + max(len(graph[i]), len(graph[j]))) for i, j in graph.edges}
        assert all(matrix[edge] == weight for edge, weight in expected.items())
    else:
        np.testing.assert_allclose(np.diag(matrix)[joined], beta, atol=1e-14)
    # the cheaper matrix of the same eigenvalues that the strategy takes
    assert spectral_gap(matrix) == pytest.approx(spectral_gap(np.sqrt(matrix * matrix.T)), abs=1e-6)


def test_spectral_gaps_have_their_closed_forms():
    nodes = 12
    cycle = mixing_matrix(drawn(ring(), nodes), self_weight=0.5)
    assert spectral_gap(cycle) == pytest.approx(0.5 - 0.5 * math.cos(2 * math.pi / nodes))
    mean = mixing_matrix(drawn(complete(), nodes), self_weight=1 / nodes)
    assert spectral_gap(mean) == pytest.approx(1.0)
    apart = mixing_matrix(drawn(from_edges([(0, 1)]), 3))
    assert spectral_gap(apart) == pytest.approx(0.0, abs=1e-12)
    swapping = mixing_matrix(drawn(from_edges([(0, 1)]), 2), self_weight=0.0)
    assert spectral_gap(swapping) == 0.0
    assert spectral_gap(np.ones((1, 1))) == 1.0
    turning = np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]])  # not reversible
    assert spectral_gap(turning) == pytest.approx(0.5)


# --- pictures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "num_nodes"),
    [(ring(), 1), (star(), 16), (torus(), 16), (complete(), 100), (regular(), 201),
     (from_edges([(0, 1), (2, 3)]), 6)],
    ids=["one", "star", "torus", "complete", "many", "pieces"],
)  # fmt: skip
def test_a_drawing_is_an_image_with_something_in_it(topology, num_nodes, tmp_path):
    place = tmp_path / "topology.png"
    draw_topology(drawn(topology, num_nodes), place, "a title")
    with Image.open(place) as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape == (1050, 1050)
    assert (pixels < 250).sum() > 1000

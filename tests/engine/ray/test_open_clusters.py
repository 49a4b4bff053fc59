"""Clusters that anybody may send work to are named."""

import pytest

from fedsim.engine.ray import cluster

OPEN = ["192.0.2.7:6379", "[2001:db8::7]:6379", "ray://192.0.2.7:10001", "head.example.org:6379"]
GUARDED = ["127.0.0.1:6379", "[::1]:6379", "localhost:6379", "ray://127.0.0.1:10001", "auto"]


@pytest.fixture
def joined(monkeypatch, caplog):
    """Join a cluster, as far as this process is concerned; returns what is logged."""
    monkeypatch.setattr(cluster.ray, "init", lambda **_: None)
    monkeypatch.setattr(cluster, "_answers", lambda _: True)

    def join(address):
        caplog.clear()
        assert cluster._start_ray(address, None, {"num_cpus": 1.0}, None) == (True, None)
        return caplog.text

    return join


@pytest.mark.parametrize(
    ("address", "named"), [(a, True) for a in OPEN] + [(a, False) for a in GUARDED]
)
def test_a_cluster_on_a_network_that_asks_for_no_token_is_named(
    address, named, joined, monkeypatch
):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert ("RAY_AUTH_MODE=token" in joined(address)) is named
    assert named is (address in joined(address))


@pytest.mark.parametrize("address", OPEN)
def test_one_that_asks_for_a_token_is_not(address, joined, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert joined(address) == ""

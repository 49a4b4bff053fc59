"""The server that Prometheus asks, over a socket of 127.0.0.1."""

import http.client
import shutil
import socket
import threading

import pytest

from fedsim.basics.errors import ScenarioError
from fedsim.basics.host_port import HostPort
from fedsim.deployment.monitoring.server import MetricsServer
from fedsim.deployment.monitoring.watch import Watch


@pytest.fixture
def runs(tmp_path):
    (tmp_path / "runs").mkdir()
    return tmp_path / "runs"


@pytest.fixture
def server(runs):
    with MetricsServer(HostPort("127.0.0.1", 0), Watch(runs)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, path, method="GET", **headers):
    host, port = server.server_address[:2]
    connection = http.client.HTTPConnection(host, port, timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer, body


def test_metrics_are_served_in_the_format_that_is_asked_for(server):
    answer, body = ask(server, "/metrics")
    assert answer.status == 200
    assert answer.getheader("Content-Type").startswith("text/plain; version=")
    assert "fedsim_runs_found 0.0\n" in body
    answer, body = ask(server, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert answer.getheader("Content-Type").startswith("application/openmetrics-text")
    assert body.endswith("# EOF\n")


def test_health_says_why_the_folder_cannot_be_read(server, runs):
    answer, body = ask(server, "/health")
    assert (answer.status, body) == (200, "ok\n")
    shutil.rmtree(runs)
    answer, body = ask(server, "/health")
    assert answer.status == 503
    assert body == f"{runs}: cannot be read: No such file or directory\n"
    runs.mkdir()
    assert ask(server, "/health")[0].status == 200


def test_other_paths_and_methods_are_refused(server):
    answer, body = ask(server, "/")
    assert (answer.status, body) == (404, "there are /metrics and /health\n")
    assert ask(server, "/metrics", "POST")[0].status == 501
    answer, body = ask(server, "/health", "HEAD")
    assert (answer.status, body) == (200, "")


def test_one_who_connects_and_says_nothing_holds_nobody_up(server):
    with socket.create_connection(server.server_address[:2]):
        assert ask(server, "/health")[0].status == 200


def test_what_goes_wrong_with_one_request_ends_nothing(server, monkeypatch):
    monkeypatch.setattr(server.watch, "look", lambda: 1 / 0)
    with pytest.raises((http.client.HTTPException, ConnectionError)):
        ask(server, "/metrics")
    monkeypatch.undo()
    assert ask(server, "/metrics")[0].status == 200


def test_a_port_that_was_just_left_can_be_taken_again(runs):
    with MetricsServer(HostPort("127.0.0.1", 0), Watch(runs)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        ask(server, "/health")
        server.shutdown()
        thread.join()
        port = server.server_address[1]
    with MetricsServer(HostPort("127.0.0.1", port), Watch(runs)) as server:
        assert server.url == f"http://127.0.0.1:{port}"


def test_a_port_that_is_taken_is_refused(server, runs):
    port = server.server_address[1]
    with pytest.raises(ScenarioError, match=f"127.0.0.1:{port}: nothing can listen there: Address"):
        MetricsServer(HostPort("127.0.0.1", port), Watch(runs))


def test_an_address_of_another_machine_is_refused(runs):
    with pytest.raises(ScenarioError, match=r"192\.0\.2\.7:9464: nothing can listen there"):
        MetricsServer(HostPort("192.0.2.7", 9464), Watch(runs))

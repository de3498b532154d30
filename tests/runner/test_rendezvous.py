"""Which process this is, and how processes find each other: what is wrong is said in one line at every end."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from jaxllm.config import EngineConfig
from jaxllm.runner import connections, rendezvous
from jaxllm.runner.connections import Follower, Leader, Peer, send_frame
from jaxllm.runner.members import Member, member_of, parse_address
from jaxllm.runner.processes import shared_facts
from tests.helpers.patience import slowness
from tests.server.live import free_port

LAST = b"last"
# Here all members are threads of one process: one that loses another must not end the test run.
connections.os = SimpleNamespace(_exit=lambda code: None)  # type: ignore[assignment]


def member(port: int, process_id: int = 0, num_processes: int = 2) -> Member:
    return Member(host="127.0.0.1", port=port, num_processes=num_processes, process_id=process_id)


@pytest.fixture(autouse=True)
def little_patience(monkeypatch):
    monkeypatch.setattr(rendezvous, "JOIN_SECONDS", 5 * slowness())
    monkeypatch.setattr(rendezvous, "_HELLO_SECONDS", 2 * slowness())


def test_configuration_goes_before_the_environment():
    launcher = {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
    assert member_of(EngineConfig(), {}) is None
    assert member_of(EngineConfig(), launcher) == member(1, 2, 3)
    assert member_of(EngineConfig(process_id=1), launcher) == member(1, 1, 3)
    alone = EngineConfig(coordinator_address="localhost:1", num_processes=1, process_id=0)
    assert member_of(alone, {}) is None


def test_description_of_the_processes_that_is_not_whole_or_no_number_is_refused():
    with pytest.raises(ValueError, match="belong together"):
        member_of(EngineConfig(coordinator_address="127.0.0.1:1", num_processes=2), {})
    with pytest.raises(ValueError, match="process_id=2 of num_processes=2"):
        EngineConfig(num_processes=2, process_id=2)
    with pytest.raises(ValueError, match="process_id=2 of num_processes=2"):
        member_of(EngineConfig(num_processes=2), {"JAX_PROCESS_ID": "2", "JAX_COORDINATOR_ADDRESS": "localhost:1"})
    with pytest.raises(ValueError, match="JAX_PROCESS_ID='two'"):
        member_of(EngineConfig(), {"JAX_PROCESS_ID": "two"})
    for field in ({"num_processes": 0}, {"num_processes": True}, {"process_id": -1}, {"process_id": 1.5}):
        with pytest.raises(ValueError, match=next(iter(field))):
            EngineConfig(**field)  # type: ignore[arg-type]


def test_slurm_says_who_is_who():
    step = {"SLURM_JOB_ID": "5", "SLURM_STEP_NODELIST": "localhost,other", "SLURM_NTASKS": "4"}
    step |= {"SLURM_PROCID": "3", "SLURM_LOCALID": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in step.items():
            patch.setenv(name, value)
        found = member_of(EngineConfig(distributed=True), {})
    assert found is not None
    assert (found.host, found.num_processes, found.process_id) == ("localhost", 4, 3)
    with pytest.raises(ValueError, match="no Slurm, GKE or TPU slice"):
        member_of(EngineConfig(distributed=True), {})


@pytest.mark.parametrize("text", ["localhost", "localhost:", "localhost:0", "localhost:70000", ":80", "http://h:80"])
def test_text_that_is_no_address_is_refused_at_once(text):
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_address(text)


def test_unknown_host_is_refused_and_a_known_one_split():
    with pytest.raises(ValueError, match=r"no machine is known as 'nowhere\.invalid'"):
        parse_address("nowhere.invalid:80")
    assert parse_address("127.0.0.1:80") == ("127.0.0.1", 80)
    assert parse_address("[::1]:80") == ("::1", 80)


def meet(port: int, *others: tuple[Member, dict]) -> list[BaseException | Leader | Follower]:
    """What process 0 and the others make of each other."""
    come: list[int] = []

    def outcome(who: Member, facts: dict) -> BaseException | Leader | Follower:
        try:
            if who.process_id:
                return rendezvous.reach(who, facts, LAST)
            leader = rendezvous.gather(who, facts, LAST)
            listen_as_jax_does(port, lambda: len(come) == len(others))
            return leader
        except ValueError as error:
            return error
        finally:
            come.extend([who.process_id] if who.process_id else [])

    everybody = [(member(port, 0, 1 + len(others)), {"size": 1}), *others]
    with ThreadPoolExecutor(len(everybody)) as pool:
        return list(pool.map(lambda one: outcome(*one), everybody))


def listen_as_jax_does(port: int, is_done: Callable[[], bool]) -> None:
    """JAX's runtime takes the port over while our connections are open there; strangers come there too."""
    with socket.create_server(("127.0.0.1", port)) as server:
        server.settimeout(0.05)
        while not is_done():
            with contextlib.suppress(TimeoutError):
                server.accept()[0].close()


def test_processes_meet_beside_strangers_agree_and_end_together():
    port = free_port()
    stranger = threading.Timer(0.1, lambda: silent.append(rendezvous._connect(member(port, 1))))
    silent: list[socket.socket] = []
    stranger.start()
    leader, *followers = meet(port, (member(port, 1, 3), {"size": 1}), (member(port, 2, 3), {"size": 1}))
    assert [type(one) for one in (leader, *followers)] == [Leader, Follower, Follower], (leader, *followers)
    with ThreadPoolExecutor(3) as pool:
        numbers = [5 << 40, 3 << 40, 4 << 40]
        assert list(pool.map(lambda one, n: one.least(n), (leader, *followers), numbers)) == [3 << 40] * 3
    heard: list[bytes] = []
    with ThreadPoolExecutor(2) as pool:
        ended = [pool.submit(one.start, lambda message: heard.append(message) or message != LAST) for one in followers]
        leader.start(lambda _: True)
        leader.announce(b"work")
        leader.stop()
        assert all(isinstance(future.exception(), SystemExit) for future in ended)
    assert sorted(heard) == [LAST, LAST, b"work", b"work"]
    for connection in silent:
        connection.close()


def test_follower_that_starts_after_the_last_message_ends_well():
    with socket.create_server(("127.0.0.1", 0)) as server:
        leader = socket.create_connection(server.getsockname())
        end = server.accept()[0]
    peer = Peer(end, "process 0", LAST)
    send_frame(leader, LAST)
    while peer.closing is False or end.fileno() != -1:
        time.sleep(0.01)
    with pytest.raises(SystemExit) as ended, leader:
        Follower(1, peer).start(lambda message: message != LAST)
    assert ended.value.code == 0


@pytest.mark.parametrize(
    ("process_id", "num_processes", "facts", "line"),
    [
        (1, 3, {"size": 1}, "process 1 was started with num_processes=3, process 0 with 2"),
        (1, 2, {"size": 2}, "process 1 was started with size=2, process 0 with 1"),
        (1, 2, {}, "process 1 was started with size=None, process 0 with 1"),
    ],
)
def test_processes_that_were_started_differently_both_say_so(process_id, num_processes, facts, line):
    port = free_port()
    outcomes = meet(port, (member(port, process_id, num_processes), facts))
    assert all(isinstance(error, ValueError) and line in str(error) for error in outcomes)


def test_number_given_twice_is_told_to_all():
    port = free_port()
    outcomes = meet(port, (member(port, 1, 3), {"size": 1}), (member(port, 1, 3), {"size": 1}))
    assert all("two processes have process_id=1" in str(error) for error in outcomes)


def test_absent_processes_are_named_after_the_deadline():
    port = free_port()
    assert "process 1, 2 of 3 did not come to" in meet_alone(port)
    with pytest.raises(ValueError, match=r"cannot be reached at 127\.0\.0\.1:.* refused"):
        rendezvous.reach(member(port, 1), {}, LAST)


def meet_alone(port: int) -> str:
    with pytest.raises(ValueError) as raised:
        rendezvous.gather(member(port, 0, 3), {}, LAST)
    return str(raised.value)


def test_port_of_another_program_is_not_mistaken_for_process_0():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match="is not process 0 of jaxllm"):
            rendezvous.reach(member(port, 1), {}, LAST)
        with pytest.raises(ValueError, match=f"cannot listen at port {port}"):
            rendezvous.gather(member(port, 0), {}, LAST)


def test_hello_that_is_no_hello_is_passed_over():
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(meet_alone, port)
        for bad in (
            b"GET / HTTP/1.1\r\n\r\n",
            struct.pack("<I", 2) + b"[]",
            struct.pack("<I", 4) + b"\xff\xff\xff\xff",
        ):
            connection = rendezvous._connect(member(port, 1))
            connection.sendall(bad)
            connection.close()
        assert "did not come" in waiting.result()


def test_every_setting_but_the_machines_own_must_be_the_same():
    config = EngineConfig(model="/here/tiny", process_id=0, num_processes=2, coordinator_address="a:1")
    other = EngineConfig(model="/there/tiny", process_id=1, num_processes=2, coordinator_address="b:1")
    assert shared_facts(config) == shared_facts(other)
    assert json.loads(json.dumps(shared_facts(config))) == shared_facts(config)
    assert shared_facts(config) != shared_facts(EngineConfig(model="/here/tiny", page_size=8))

"""A batch on two hosts made of namespaces of Linux: one loses its cable and dies, no video is lost.

Each has its own network, processes, host name and `/tmp/ray`; the output folder is shared. It takes
about a minute, so it runs only when asked for: `pytest -m hosts`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from motionmerge.io.video import read_video_metadata

from ..tiny.pipelines import photo
from .test_batch import write_manifest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'motionmerge[ray]'")

pytestmark = pytest.mark.hosts

HEAD, OTHER = (f"mm{os.getpid()}{letter}" for letter in "ab")
ADDRESSES = {HEAD: "10.77.0.1", OTHER: "10.77.0.2"}
COUNT = 10
QUICK_TO_NOTICE = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
ISOLATED = [
    "unshare",
    "--mount",
    "--uts",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "sh",
    "-ec",
]
RAY_START = f"'{sys.executable}' -m ray.scripts.scripts start --num-cpus=1 --disable-usage-stats"


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


@pytest.fixture
def network() -> Iterator[None]:
    """Two network namespaces with a cable between them."""
    try:
        for host in (HEAD, OTHER):
            ip(f"netns add {host}")
        ip(f"link add {HEAD} netns {HEAD} type veth peer name {OTHER} netns {OTHER}")
        for host in (HEAD, OTHER):
            ip(f"-n {host} address add {ADDRESSES[host]}/24 dev {host}")
            for device in ("lo", host):
                ip(f"-n {host} link set {device} up")
            # Ray looks for its own address on the way to the internet.
            ip(f"-n {host} route add default dev {host}")
        subprocess.run([*ISOLATED, "true"], check=True, capture_output=True)
        yield
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"Namespaces cannot be made here: {error}")
    finally:
        for host in (HEAD, OTHER):
            with suppress(OSError, subprocess.CalledProcessError):
                ip(f"netns delete {host}")


def start(host: str, script: str, output: Path) -> subprocess.Popen[bytes]:
    """Run a shell script on a host of its own: when this process is killed, so is all on it."""
    Path("/tmp/ray").mkdir(exist_ok=True)
    own = f"hostname {host}; mount -t tmpfs none /tmp/ray; export HOME=/tmp/ray; {script}"
    environment = {**os.environ, **QUICK_TO_NOTICE, "OMP_NUM_THREADS": "1"}
    environment.update(RAY_ADDRESS=f"{ADDRESSES[HEAD]}:6379", RAY_AUTH_MODE="disabled")
    with output.open("wb") as file:
        command = ["ip", "netns", "exec", host, *ISOLATED, own]
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def wait_for(is_so: Callable[[], bool], what: str, *logs: Path) -> None:
    deadline = time.monotonic() + 240
    while not is_so():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}\n" + "\n".join(log.read_text() for log in logs))
        time.sleep(0.1)


def titles(of: str) -> dict[int, str]:
    """Return the processes on a host: all that are in its network namespace."""
    listed = subprocess.run(["ip", "netns", "pids", of], capture_output=True, text=True, check=True)
    found = {}
    for number in map(int, listed.stdout.split()):
        with suppress(OSError):
            found[number] = Path(f"/proc/{number}/cmdline").read_text().replace("\0", " ")
    return found


def test_the_death_of_a_whole_host_loses_no_video_and_makes_none_twice(
    network: None, tmp_path: Path
) -> None:
    photo(24).save(tmp_path / "photo.png")
    prompt = "the camera pans left"
    rows = [{"image": "photo.png", "seed": seed, "prompt": prompt} for seed in range(COUNT)]
    manifest, videos = write_manifest(tmp_path, rows), tmp_path / "videos"
    logs = {host: tmp_path / f"{host}.log" for host in ADDRESSES}
    head = f"{RAY_START} --head --node-ip-address={ADDRESSES[HEAD]} --include-dashboard=false"
    batch = (
        f"'{sys.executable}' -m motionmerge.cli batch '{manifest}' -o '{videos}' --size 64 "
        f"--steps 8 --ray --json > '{tmp_path}/report.json'"
    )
    join = f"{RAY_START} --node-ip-address={ADDRESSES[OTHER]} --address=$RAY_ADDRESS --block"
    hosts = []
    try:
        hosts.append(start(HEAD, f"{head}; {batch}", logs[HEAD]))
        hosts.append(start(OTHER, f"until {join}; do sleep 1; done", logs[OTHER]))
        is_at_work = lambda: any("Worker.make" in title for title in titles(OTHER).values())  # noqa: E731
        wait_for(is_at_work, "The host that joins makes no video.", *logs.values())
        wait_for(lambda: len(list(videos.glob("*.mp4"))) >= 3, "No video.", *logs.values())
        wait_for(is_at_work, "The host that joins makes no video.", *logs.values())
        made_before = len(list(videos.glob("*.mp4")))
        ip(f"-n {OTHER} link set {OTHER} down")  # so that nobody is told of its death
        hosts[1].kill()
        wait_for(lambda: not titles(OTHER), "The host lives on.")
        assert hosts[0].wait(timeout=300) == 0, logs[HEAD].read_text()
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    assert made_before < COUNT
    report = json.loads((tmp_path / "report.json").read_text())
    assert (len(report["done"]), report["failures"]) == (COUNT, [])
    assert len(set(report["done"])) == COUNT == len(list(videos.iterdir()))
    for name in report["done"]:
        assert read_video_metadata(videos / name)

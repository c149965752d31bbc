"""A batch on hosts made of namespaces of Linux: driver and hosts die, a cable is cut, all is made.

Each host has its own network, processes, host name and `/tmp/ray`; the output folder is shared. It
takes minutes on a slow machine, so it runs only when asked for: `pytest -m hosts`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from motionmerge.io.video import read_video_metadata
from motionmerge.sampling.batch.manifest import plan, read_manifest
from motionmerge.sampling.videos.settings import VideoSettings

from ..tiny.pipelines import photo
from .test_batch import write_manifest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'motionmerge[ray]'")

pytestmark = pytest.mark.hosts

SWITCH, HEAD, LOST, CUT = (f"mm{os.getpid()}{letter}" for letter in "sabc")
ADDRESSES = {HEAD: "10.77.0.1", LOST: "10.77.0.2", CUT: "10.77.0.3"}
COUNT = 8
SECONDS_CUT = 40
QUICK_TO_NOTICE = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
ISOLATED = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
RAY = f"'{sys.executable}' -m ray.scripts.scripts start --disable-usage-stats"

DRIVER = '''
"""Make what is missing on the cluster, with workers that make as many videos as is allowed."""

import json, os, platform, sys, time
from dataclasses import asdict, dataclass
from pathlib import Path

from motionmerge.sampling.batch.batch import BatchOptions, missing
from motionmerge.sampling.batch.manifest import plan, read_manifest
from motionmerge.sampling.batch.ray_batch import run_on_ray
from motionmerge.sampling.batch.ray_cluster import joined_cluster
from motionmerge.sampling.request.experts import ExpertChoice
from motionmerge.sampling.request.model import ShippedModel
from motionmerge.sampling.videos.settings import VideoSettings


@dataclass(frozen=True)
class Gated(ShippedModel):
    folder: str = sys.argv[1]

    def load(self, encode=None):
        pipeline, where = super().load(encode)
        folder, start = Path(self.folder), type(pipeline).__call__

        def call(pipeline, *arguments, **options):
            (folder / f"at-work-{platform.node()}-{os.getpid()}").touch()
            while len(list(folder.glob("videos/*.mp4"))) >= int((folder / "allowed").read_text()):
                time.sleep(0.05)
            return start(pipeline, *arguments, **options)

        pipeline.__class__ = type("PocketPipeline", (type(pipeline),), {"__call__": call})
        return pipeline, where


folder = Path(sys.argv[1])
joined_cluster()
jobs = read_manifest(folder / "manifest.jsonl", defaults=VideoSettings(**json.loads(sys.argv[2])))
todo = missing(plan(jobs, folder / "videos", fingerprint={}))
report = run_on_ray(Gated(), ExpertChoice(), todo, BatchOptions())
(folder / "report.json").write_text(json.dumps(asdict(report)))
'''
FAST = VideoSettings(prompt="the camera pans left", height=64, width=64, num_inference_steps=1)


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True)


@pytest.fixture
def network() -> Iterator[None]:
    """Network namespaces, each with a cable to a switch, which is one as well."""
    try:
        ip(f"netns add {SWITCH}")
        ip(f"-n {SWITCH} link add bridge type bridge")
        ip(f"-n {SWITCH} link set bridge up")
        for host, address in ADDRESSES.items():
            ip(f"netns add {host}")
            ip(f"link add {host} netns {host} type veth peer name {host} netns {SWITCH}")
            ip(f"-n {SWITCH} link set {host} master bridge up")
            ip(f"-n {host} address add {address}/24 dev {host}")
            for device in ("lo", host):
                ip(f"-n {host} link set {device} up")
            # Ray looks for its own address on the way to the internet.
            ip(f"-n {host} route add default dev {host}")
        subprocess.run([*ISOLATED, "true"], check=True, capture_output=True)
        yield
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"Namespaces cannot be made here: {error}")
    finally:
        for host in (SWITCH, *ADDRESSES):
            with suppress(OSError, subprocess.CalledProcessError):
                ip(f"netns delete {host}")


def start(host: str, script: str, output: Path) -> subprocess.Popen[bytes]:
    """Run a shell script on a host of its own: when this process is killed, so is all on it."""
    Path("/tmp/ray").mkdir(exist_ok=True)
    own = f"hostname {host}; mount -t tmpfs none /tmp/ray; export HOME=/tmp/ray; {script}"
    environment = {**os.environ, **QUICK_TO_NOTICE, "OMP_NUM_THREADS": "1"}
    environment.update(RAY_ADDRESS=f"{ADDRESSES[HEAD]}:6379", RAY_AUTH_MODE="disabled")
    with output.open("wb") as file:
        command = ["ip", "netns", "exec", host, *ISOLATED, "sh", "-ec", own]
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def titles(of: str) -> dict[int, str]:
    """Return the processes on a host: all that are in its network namespace."""
    listed = subprocess.run(["ip", "netns", "pids", of], capture_output=True, text=True, check=True)
    found = {}
    for number in map(int, listed.stdout.split()):
        with suppress(OSError):
            found[number] = Path(f"/proc/{number}/cmdline").read_text().replace("\0", " ")
    return found


class Watch:
    """Waits for things to happen, and sees to it that no video is made again meanwhile."""

    def __init__(self, folder: Path, logs: dict[str, Path]) -> None:
        self._folder, self._logs = folder, logs
        self.files: dict[str, tuple[int, int]] = {}

    def look(self) -> None:
        for path in (self._folder / "videos").glob("*.mp4"):
            about = (path.stat().st_ino, path.stat().st_mtime_ns)
            assert self.files.setdefault(path.name, about) == about, f"{path} was made twice"

    def until(self, is_so: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + 400
        while not is_so():
            self.look()
            if time.monotonic() > deadline:
                logs = "\n".join(log.read_text() for log in self._logs.values())
                pytest.fail(f"{what}\n{logs}")
            time.sleep(0.1)

    def at_work(self, host: str) -> set[Path]:
        return set(self._folder.glob(f"at-work-{host}-*"))


def test_no_video_is_lost_or_made_twice_when_driver_and_hosts_die_and_a_cable_is_cut(
    network: None, tmp_path: Path
) -> None:
    photo(24).save(tmp_path / "photo.png")
    manifest = write_manifest(tmp_path, [{"image": "photo.png", "seed": s} for s in range(COUNT)])
    videos = plan(read_manifest(manifest, defaults=FAST), tmp_path / "videos", fingerprint={})
    (tmp_path / "driver.py").write_text(DRIVER)
    allowed = tmp_path / "allowed"
    allowed.write_text("2")
    logs = {host: tmp_path / f"{host}.log" for host in ADDRESSES}
    watch = Watch(tmp_path, logs)
    settings = FAST.model_dump_json(exclude_none=True)
    driver = f"'{sys.executable}' '{tmp_path}/driver.py' '{tmp_path}' '{settings}'"
    head = (
        f"{RAY} --head --node-ip-address={ADDRESSES[HEAD]} --num-cpus=0 --include-dashboard=false;"
        f"until [ -e '{tmp_path}/go' ]; do sleep 0.2; done; {driver} || {driver}"
    )
    is_none = (
        f"'{sys.executable}' -c 'from motionmerge.sampling.batch import ray_cluster;"
        "ray_cluster.cluster_device()' || true"
    )
    hosts = {}
    try:
        hosts[HEAD] = start(HEAD, head, logs[HEAD])
        watch.until(lambda: "started" in logs[HEAD].read_text(), "The head does not start.")
        for host in (LOST, CUT):
            join = f"{RAY} --node-ip-address={ADDRESSES[host]} --num-cpus=1 --address=$RAY_ADDRESS"
            script = f"{is_none}; while true; do {join} --block || sleep 1; done"
            hosts[host] = start(host, script, logs[host])
        for host in (LOST, CUT):
            watch.until(lambda host=host: "started" in logs[host].read_text(), f"{host} is alone.")
            assert "start the driver on a node" in logs[host].read_text()  # before it was one

        (tmp_path / "go").touch()
        for host in (LOST, CUT):
            watch.until(lambda host=host: watch.at_work(host), "It makes nothing.")
        watch.until(lambda: len(watch.files) >= 2, "No video.")
        before = {host: watch.at_work(host) for host in (LOST, CUT)}
        own = f"{sys.executable} {tmp_path}/driver.py"
        (first,) = (number for number, title in titles(HEAD).items() if title.startswith(own))
        os.kill(first, signal.SIGKILL)

        for host in (LOST, CUT):
            watch.until(lambda host=host: watch.at_work(host) - before[host], "It has stopped.")
        made_before = set(watch.files)
        assert 2 <= len(made_before) < COUNT - 2
        for host in (LOST, CUT):
            ip(f"-n {SWITCH} link set {host} down")
        cut_at = time.monotonic()
        hosts[LOST].kill()
        watch.until(lambda: not titles(LOST), "The host lives on.")
        before[CUT] = watch.at_work(CUT)
        allowed.write_text(f"{COUNT}")
        watch.until(lambda: time.monotonic() > cut_at + SECONDS_CUT, "Time stands still.")
        made_while_cut = set(watch.files) - made_before
        assert made_while_cut and len(watch.files) < COUNT
        ip(f"-n {SWITCH} link set {CUT} up")
        watch.until(lambda: watch.at_work(CUT) - before[CUT], "It does not come back.")
        watch.until(lambda: hosts[HEAD].poll() is not None, "The batch does not end.")
        assert hosts[HEAD].returncode == 0, logs[HEAD].read_text()
        watch.look()
    finally:
        for process in hosts.values():
            process.kill()
            process.wait()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["failures"] == []
    assert sorted([*report["done"], *report["found"]]) == sorted(set(watch.files) - made_before)
    assert set(watch.files) == {video.path.name for video in videos}
    assert {path.name for path in (tmp_path / "videos").iterdir()} == set(watch.files)
    for video in videos:
        assert read_video_metadata(video.path)

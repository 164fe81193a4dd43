"""The few Linux system calls that a container is made of, with errors that name what failed.

libc is called directly: a mount(8) process for each mount would take longer than the rest of a
start. bubblewrap is no help: before 0.11 it has no overlay, it mounts no squashfs, and it stays the
parent of the command, so Slurm's signals would reach it instead.

Sources: mount(2), pivot_root(2), unshare(2), loop(4), prctl(2), pid_namespaces(7).
"""

import ctypes
import errno
import fcntl
import os
import signal
import struct
import subprocess
import tempfile
import time
from pathlib import Path

from post_training.core.errors import PostTrainingError
from post_training.core.process import dies_with

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC = 32, 4096, 16384
PROPAGATION = {"private": 1 << 18, "slave": 1 << 19, "shared": 1 << 20}
MNT_DETACH = 2
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_LOOP_CTL_GET_FREE, _LOOP_SET_FD, _LOOP_CLR_FD, _LOOP_SET_STATUS64 = 0x4C82, 0x4C00, 0x4C01, 0x4C04
_LO_FLAGS_READ_ONLY, _LO_FLAGS_AUTOCLEAR = 1, 4
# Flags of a mount that statvfs shows.
_ST_FLAGS = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
_MOUNT_TIMEOUT_S = 30
# This machine's processors. An emulated program that reads of them here, though its own are others,
# may crash: torch for arm64 does while it is imported on x86_64 (its library cpuinfo).
HOST_CPUS = Path("/sys/devices/system/cpu")
# The arm64 processor that qemu imitates. By default its SVE vectors have 512 bits; Grace's have
# 128, and the BLAS of torch's wheels (NVPL) counts on that: small matrix products were off by 0.2.
EMULATED_ARM64 = {"QEMU_CPU": "max,sve-default-vector-length=16"}
# e_machine in the header of a program (elf(5)), for each processor as uname(2) names it.
_ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
# Where the kernel shows which programs it hands to which interpreter.
_EMULATORS = Path("/proc/sys/fs/binfmt_misc")
_ELF_MACHINE = struct.Struct("<18xH")

_libc = ctypes.CDLL(None, use_errno=True)


def mount(
    source: str, target: str | Path, kind: str | None = None, flags: int = 0, data: str = ""
) -> None:
    """mount(2). kind: of the file system. data: its options."""
    _call(
        f"mount {source or kind or 'propagation'} on {target}",
        _libc.mount, source.encode(), os.fsencode(target), kind and kind.encode(),
        ctypes.c_ulong(flags), data.encode(),
    )  # fmt: skip


def bind(
    source: str | Path, target: str | Path, *, read_only: bool = False, flags: int = 0
) -> None:
    """Make `source`, with everything mounted below it, also visible at `target`.

    Its own restrictions (read-only, nosuid, …) stay; flags: further MS_* ones.
    """
    mount(str(source), target, flags=MS_BIND | MS_REC)
    wanted = flags | (MS_RDONLY if read_only else 0)
    if wanted:
        # In a user namespace, a remount that drops one of the mount's flags is refused.
        kept = os.statvfs(target).f_flag & _ST_FLAGS
        mount("", target, flags=MS_REMOUNT | MS_BIND | kept | wanted)


def is_emulated(program: Path) -> bool:
    """Whether the program is for another processor than this machine's."""
    with program.open("rb") as file:
        header = file.read(_ELF_MACHINE.size)
    is_program = header.startswith(b"\x7fELF") and len(header) == _ELF_MACHINE.size
    own = _ELF_MACHINES.get(os.uname().machine)
    return is_program and own is not None and _ELF_MACHINE.unpack(header)[0] != own


def can_emulate(architecture: str, registered: Path = _EMULATORS) -> bool:
    """Whether the kernel hands programs for this processor to an emulator, such as qemu.

    architecture: as uname(2) names it. registered: the folder in which the kernel shows what is.
    """
    machine = struct.pack("<H", _ELF_MACHINES[architecture]).hex()
    for path in registered.glob("*"):
        if path.name in ("register", "status"):  # The first can't be read.
            continue
        state, *lines = path.read_text().splitlines()
        magic = next((line.split()[1] for line in lines if line.startswith("magic ")), "")
        is_elf = magic.startswith(b"\x7fELF".hex())
        if state == "enabled" and is_elf and magic[36:40] == machine:
            return True
    return False


def detach(target: str | Path) -> None:
    """Unmount at once from what is seen; really, when nobody uses it any more."""
    _call(f"unmount {target}", _libc.umount2, os.fsencode(target), MNT_DETACH)


def pivot_root(new_root: str | Path, put_old: str | Path) -> None:
    """Make the mount `new_root` the root, and move the old root to `put_old` below it."""
    _call("pivot_root", _libc.pivot_root, os.fsencode(new_root), os.fsencode(put_old))


def leave_pid_1() -> None:
    """Where this process is the first of a container (`docker run`, a pod), go on in a child.

    The kernel keeps from process 1 every signal that it doesn't handle itself, so a command in its
    place, such as `sleep`, could not be ended by SIGTERM. Elsewhere nothing happens: the command
    has to keep the pid that Slurm signals.
    """
    if os.getpid() != 1:
        return
    # Blocked before the fork: a signal then waits for the loop that hands it on.
    faults = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - faults)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return
    os._exit(_hand_signals_on(child))


def _hand_signals_on(child: int) -> int:
    """Until the child ends; its exit code, 128 + N where signal N ended it. Orphans that the kernel
    gives to process 1 are waited for."""
    handed_on = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
    while True:
        info = signal.sigwaitinfo(handed_on)
        if info.si_signo != signal.SIGCHLD:
            # What the terminal sends (Ctrl-C), its code above 0, has reached the child already.
            if info.si_code <= 0:
                os.kill(child, info.si_signo)
            continue
        while (ended := os.waitpid(-1, os.WNOHANG))[0] != 0:
            if ended[0] == child:
                code = os.waitstatus_to_exitcode(ended[1])
                return code if code >= 0 else 128 - code


def enter_mount_namespace() -> None:
    """From now on, only this process and its children see what it mounts.

    An ordinary user becomes root in a new user namespace, since mounting needs that; `become_user`
    undoes it.
    """
    if os.geteuid() == 0:
        _call("unshare", _libc.unshare, _CLONE_NEWNS)
    else:
        uid, gid = os.geteuid(), os.getegid()
        _call("unshare (are user namespaces allowed here?)",
              _libc.unshare, _CLONE_NEWUSER | _CLONE_NEWNS)  # fmt: skip
        _map_ids(inner=(0, 0), outer=(uid, gid))
    # Slave: mounts and unmounts on the host still reach us, ours never reach the host.
    mount("", "/", flags=MS_REC | PROPAGATION["slave"])


def become_user(uid: int, gid: int) -> None:
    """Go back to the user's own ids, and give up the rights of the namespace's root."""
    _call("unshare", _libc.unshare, _CLONE_NEWUSER)
    _map_ids(inner=(uid, gid), outer=(0, 0))


def _map_ids(inner: tuple[int, int], outer: tuple[int, int]) -> None:
    """Give this process, (uid, gid) `outer` outside its user namespace, the ids `inner` in it."""
    # The kernel refuses a gid_map of an ordinary user before setgroups(2) is denied.
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{inner[0]} {outer[0]} 1")
    Path("/proc/self/gid_map").write_text(f"{inner[1]} {outer[1]} 1")


def mount_squashfs(file: int, name: Path, target: Path) -> None:
    """Mount the squashfs open as descriptor `file`: as root by the kernel, else by squashfuse.

    name: its path, for errors. Errors: PostTrainingError.
    """
    target.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0 and _is_initial_user_namespace():
        _mount_squashfs_loop(file, name, target)
    else:
        _mount_squashfs_fuse(file, name, target)


def _is_initial_user_namespace() -> bool:
    """Root of any other namespace may not use loop devices."""
    return Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]


def _mount_squashfs_loop(file: int, name: Path, target: Path) -> None:
    # loop_info64: five u64, three u32, then u32 flags (offset 52); 232 bytes in all.
    info = bytearray(232)
    struct.pack_into("=I", info, 52, _LO_FLAGS_READ_ONLY | _LO_FLAGS_AUTOCLEAR)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    while True:
        device = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
        loop = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(loop, _LOOP_SET_FD, file)
        except OSError as error:
            os.close(loop)
            if error.errno == errno.EBUSY:  # Another process took this device first.
                continue
            raise
        break
    os.close(control)
    try:
        fcntl.ioctl(loop, _LOOP_SET_STATUS64, bytes(info))
        mount(device, target, "squashfs", MS_RDONLY | MS_NODEV)
    except BaseException as error:
        fcntl.ioctl(loop, _LOOP_CLR_FD)
        if isinstance(error, PostTrainingError):
            raise PostTrainingError(f"cannot mount it: {error.problem}", where=str(name),
                                    hint="is it a squashfs? `file` tells") from None  # fmt: skip
        raise
    finally:
        os.close(loop)  # AUTOCLEAR: the device is freed when its last mount goes.


def _mount_squashfs_fuse(file: int, name: Path, target: Path) -> None:
    before = target.stat().st_dev
    # A file, not a pipe: nobody would read the pipe once the command has replaced this process.
    output = tempfile.TemporaryFile()  # noqa: SIM115
    try:
        process = subprocess.Popen(
            ["squashfuse_ll", "-f", f"/proc/self/fd/{file}", str(target)],
            pass_fds=[file], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=output, preexec_fn=dies_with(os.getpid()),
            # In the foreground (-f) it ends with us; a daemon would keep the namespace for ever.
            # A session of its own: Ctrl-C is for the command.
            start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise PostTrainingError(
            "squashfuse_ll: not installed; an ordinary user needs it to mount an image",
            hint="apt-get install squashfuse",
        ) from None
    deadline = time.monotonic() + _MOUNT_TIMEOUT_S
    while target.stat().st_dev == before:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            output.seek(0)
            lines = output.read().decode(errors="replace").strip().splitlines()
            raise PostTrainingError(
                f"squashfuse cannot mount it: {lines[-1] if lines else 'it said nothing'}",
                where=str(name),
                hint="an ordinary user needs /dev/fuse open for reading and writing",
            )
        time.sleep(0.002)
    # It outlives this Popen on purpose; a set return code keeps Popen from warning of that.
    process.returncode = 0


def _call(what: str, function, *arguments) -> None:
    """Call a function of libc. Errors: PostTrainingError that begins with `what`."""
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise PostTrainingError(f"{what}: {os.strerror(number).lower()}")

"""The files that Slurm's daemons read: those of a production cluster where it matters (freezer tracking, requeues, preemption,
return to service), with waits cut short."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

_SLURM_CONF = """\
ClusterName={tag}
SlurmctldHost={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType={proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
JobRequeue=1
MinJobAge=3600
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,sched_min_interval=0,batch_sched_delay=0,nohold_on_prolog_fail
KillWait=5
CompleteWait=0
SlurmctldTimeout=10
SlurmdTimeout=10
MessageTimeout=5
InactiveLimit=0
Waittime=0
TreeWidth=64
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{lines}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=graceful Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def new_tag() -> str:
    """A short name that tells one cluster of this machine from another."""
    return "".join(secrets.choice("abcdefghijkmnpqrstuvwxyz") for _ in range(4))


def write_settings(
    folder: Path,
    *,
    tag: str,
    user: str,
    controller: str,
    nodes: Sequence[str],
    cpus_per_node: int,
    gpus_per_node: int,
    proctrack: str = "proctrack/linuxproc",
    more: Sequence[str] = (),
) -> None:
    """Write `slurm.conf`, `gres.conf` with fake GPUs, and munge's key.

    Args:
        folder: Of the cluster; becomes its state's home as well.
        tag: Its name.
        user: Whose the daemons are.
        controller: `SlurmctldHost`.
        nodes: Of each what follows `NodeName=`, its name first, without what it holds.
        cpus_per_node: Processors that Slurm may give away, whatever the machine has.
        gpus_per_node: Fake GPUs.
        proctrack: How Slurm knows a job's processes.
        more: Further lines.
    """
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o400)
    holds = f"CPUs={cpus_per_node} RealMemory=8000 Gres=gpu:{gpus_per_node} State=UNKNOWN"
    lines = "\n".join([*more, *(f"NodeName={node} {holds}" for node in nodes)])
    text = _SLURM_CONF.format(tag=tag, folder=folder, user=user, controller=controller, proctrack=proctrack, lines=lines)
    (folder / "slurm.conf").write_text(text)
    # A device must be one: with plain files Slurm sets no CUDA_VISIBLE_DEVICES.
    for gpu in range(gpus_per_node):
        (folder / f"gpu{gpu}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{gpus_per_node - 1}]\n" if gpus_per_node else "")

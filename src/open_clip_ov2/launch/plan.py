"""What a submission will do, for eyes: before it is done, or instead."""

from __future__ import annotations

from open_clip_ov2.launch.cluster import ClusterOptions
from open_clip_ov2.launch.folder import SLURM
from open_clip_ov2.launch.submit import How, Work


def show_plan(work: Work, how: How) -> None:
    print(f"folder    {work.folder}")
    print(f"cluster   {how.cluster_file or 'no file of defaults'}")
    for index, options in enumerate(how.clusters, 1):
        stage = f"stage {index}: " if how.stage_jobs else ""
        print(f"{'jobs' if index == 1 else '':<10}{stage}{_resources(options, how.executor)}")
    for member, checked in zip(work.members, work.checked, strict=True):
        where = f"{member.name}: " if len(work.members) > 1 else ""
        millions = checked.parameters / 1e6
        print(f"run       {where}{checked.model}, {millions:,.1f} M parameters, {checked.total_samples:,} samples")
        for number, summary in enumerate(checked.summaries, 1):
            if summary:
                print(f"          stage {number}: {summary}")


def _resources(options: ClusterOptions, executor: str) -> str:
    tasks = f"{options.world_size} process{'es' if options.world_size > 1 else ''}"
    device = f"{options.gpus_per_node} GPUs a node" if options.gpus_per_node else "on CPUs"
    if executor != SLURM:
        return f"{executor}, {tasks}, {device}"
    queue = f"partition {options.partition}" if options.partition else "default partition"
    hours, minutes = divmod(options.time_min, 60)
    return f"{options.nodes} nodes, {tasks}, {device}, {queue}, {hours} h {minutes:02d} min"

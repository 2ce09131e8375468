"""Names that cross a process, file or job border: spelt once, never changed, added to only.

Environment names are read by `ktrain.base.settings` alone.
"""

from __future__ import annotations

# Environment of a worker started by a supervisor (torch's own names are set beside these).
ENV_RUN = "KTRAIN_RUN"  # URI of the run
ENV_EPOCH = "KTRAIN_EPOCH"  # the attempt's epoch, a positive integer
ENV_NODE = "KTRAIN_NODE"  # this node's name, "node-0"
ENV_AGENT = "KTRAIN_AGENT"  # address of the node's agent, "unix:/path"
ENV_TOKEN_FILE = "KTRAIN_TOKEN_FILE"  # noqa: S105 -- a path: the token itself never stands in an environment
ENV_VOLUME = "KTRAIN_VOLUME"  # folder on a memory-backed file system for the memory tier
ENV_PATIENCE = "KTRAIN_PATIENCE_S"  # the one setting from which every timeout is derived
ENV_FAULTS = "KTRAIN_FAULTS"  # fault points to fire in this process (tests)
ENV_DRAIN_RATE = "KTRAIN_DRAIN_BYTES_PER_S"  # what one node's drains may send to the bucket; unset means no limit
ENV_SPREAD = "KTRAIN_RESTORE_SPREAD"  # whether a restore reads the bucket once a job: auto, always, never
ENV_DISK = "KTRAIN_DISK"  # node directory of the disk tier; unset means no disk tier
ENV_ROOT = "KTRAIN_ROOT"  # in a pod that runs as processes: the folder that stands for `/` (ADR 0036)
ENV_HOSTS = "KTRAIN_HOSTS"  # in a pod that runs as processes: names of pods and their addresses, as in /etc/hosts

# Environment of the containers of a pod, beside those above (ADR 0030).
ENV_HEAD = "KTRAIN_HEAD"  # address of the head, "tcp:HOST:PORT"
ENV_JOB = "KTRAIN_JOB"  # path of the job's specification, JSON
ENV_ROLE = "KTRAIN_ROLE"  # head or worker
ENV_JOB_INDEX = "KTRAIN_JOB_INDEX"  # of the pod's Job among those of its role: the TPU slice, else 0
ENV_POD_INDEX = "KTRAIN_POD_INDEX"  # of the pod in its Job
ENV_POD_IP = "KTRAIN_POD_IP"
ENV_POD_NAME = "KTRAIN_POD_NAME"
ENV_POD_NAMESPACE = "KTRAIN_POD_NAMESPACE"
ENV_HOST = "KTRAIN_HOST"  # name of the machine below the pod

# Environment of the init container of code from git, out of a Secret that it names (ADR 0043).
ENV_GIT_USERNAME = "KTRAIN_GIT_USERNAME"
ENV_GIT_PASSWORD = "KTRAIN_GIT_PASSWORD"  # noqa: S105 -- a name: git reads it, ktrain never does

# Exit codes of workers, head and command line.
EXIT_OK = 0
EXIT_FAILED = 1  # the job failed and its restart budget is spent
EXIT_USAGE = 2  # bad input; nothing was started or changed
EXIT_CORRUPT = 3  # `ckpt verify`: something is not proven; restore: no good copy is left
EXIT_CONFLICT = 4  # the run is live under another holder
EXIT_UNAVAILABLE = 5  # storage or a peer could not be reached; nothing is known to be wrong
EXIT_UNFINISHED = 6  # `wait`, `launch --wait`: the time was over before the job was
EXIT_BAD_NODE = 74  # supervisor in a pod: this node is suspected; its pod is to be made anew
EXIT_AGAIN = 75  # head in a pod: make all pods anew, and count it
EXIT_AGAIN_FREE = 76  # head in a pod: make all pods anew after a disruption, which is nobody's fault and not counted
EXIT_STOPPED = 130  # stopped on request (signal or cancel) after a save; the same command continues
EXIT_ENDED = 143  # head in a pod: told to end (SIGTERM) before its verdict; the next head goes on
# What a restart cannot mend: the head's verdict is final. A head that ends in any other way is started again.
EXITS_FINAL = (EXIT_FAILED, EXIT_USAGE, EXIT_CORRUPT, EXIT_CONFLICT, EXIT_UNAVAILABLE, EXIT_STOPPED)

# Labels of every object of a job, and where things lie in its containers (ADR 0030).
LABEL_RUN = "ktrain.dev/run"
LABEL_ROLE = "ktrain.dev/role"
ANNOTATION_RUN = "ktrain.dev/run-url"
ANNOTATION_SUBMISSION = "ktrain.dev/submission"  # who wrote the object: tells an own write whose answer was lost
ANNOTATION_NUMBER = "ktrain.dev/submission-number"  # of the submission among those of its job, from 1
ANNOTATION_CANCELLED = "ktrain.dev/cancelled"  # of a JobSet that a user stopped
POD_DIR = "/ktrain"
POD_VOLUME = "/ktrain/memory"  # the memory tier
POD_WORK = "/ktrain/work"  # sockets and logs, shared by agent and trainer
POD_CODE = "/ktrain/code"
POD_CARRIED = "/ktrain/carried"  # the archive of the code, as it arrived
POD_JOB_FILE = "/ktrain/job/job.json"
SUBMISSION_FILE = "submission.json"  # beside it: what was known when the job was sent (ADR 0040)
POD_TOKEN_FILE = "/ktrain/token/token"  # noqa: S105 -- a path: the run's own token, not one of the cluster
POD_READY_FILE = "/ktrain/work/agent-ready"  # made by the agent when it has joined the head
POD_HEAD_PORT = 7410
MEMORY_CLAIM = "ktrain-memory"  # claim, and class of volumes, of memory that nodes lend to a namespace (ADR 0045)

# Inside RUN (any fsspec URL).
EVENTS_FILE = "events.jsonl"
EVENTS_DIR = "events"
CHECKPOINTS_DIR = "checkpoints"
ATTEMPTS_DIR = "attempts"
MARKS_DIR = "marks"  # pins, readers, what is about to go, late metrics (ADR 0012)
CODE_DIR = "code"  # archives of code by their digest, with a record of each (ADR 0043)
CADENCE_DIR = "cadence"  # what `every="auto"` chose
QUARANTINE_DIR = "quarantine"  # marks: steps that are set aside, or trusted again
LOGS_DIR = "logs"
SUBMISSIONS_DIR = "submissions"  # what was sent to a cluster, in the order in which the run was told (ADR 0040)
RUN_FILE = "run.json"  # identity of the run: its id, made once
HOLDER_FILE = "holder.json"  # who runs it now
LAUNCH_FILE = "launch.json"  # who launched it last, and how that ended (ADR 0042)
FUNCTION_DIR = "function"  # the function that was launched, where no cluster carries it
HEAD_FILE = "head.json"  # what a head in a pod leaves for the next one (ADR 0038)
LOCAL_DIR = "local"  # files of a local launch: head address, token, status

# Inside a node's volume.
VOLUME_FILE = "volume.json"
COMMITTED_FILE = "committed.json"

# The names of the tiers.
TIER_MEMORY = "memory"
TIER_PEER = "peer"
TIER_DISK = "disk"
TIER_BUCKET = "bucket"
TIERS = (TIER_MEMORY, TIER_PEER, TIER_DISK, TIER_BUCKET)

# Causes of a failed attempt; each has its own restart budget.
CAUSE_CRASH = "crash"  # a worker exited non-zero or died by a signal
CAUSE_HANG = "hang"  # a rank made no step within its deadline
CAUSE_NODE_LOST = "node-lost"  # a node's agent and supervisor are gone
CAUSE_AGENT = "agent"  # an agent died (training goes on)
CAUSE_STOPPED = "stopped"  # asked to stop
CAUSE_ALL_LOST = "all-lost"  # every node at once


def step_dirname(step: int) -> str:
    """`step-00000010`."""
    return f"step-{step:08d}"


def format_file(version: int) -> str:
    """`format-000002.json`, which says that the run was upgraded to that format version."""
    return f"format-{version:06d}.json"


def rank_dirname(rank: int) -> str:
    """`rank-00003`, the folder of a rank's slots in a volume."""
    return f"rank-{rank:05d}"


def node_name(node_index: int) -> str:
    """`node-0`."""
    return f"node-{node_index}"

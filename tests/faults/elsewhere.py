"""Faults that only real processes, stores or devices show: where they are shown. (fault, what is done, test)."""

from __future__ import annotations

_KINDS = "tests/chaos/test_kinds.py"
_ENDS_AN_ATTEMPT = f"{_KINDS}::test_launch_fault_that_ends_an_attempt_names_cause_and_tier"
_BESIDE_TRAINING = f"{_KINDS}::test_launch_fault_beside_training_does_not_end_the_attempt"
_EVENTS = f"{_KINDS}::test_launch_killed_with_events_on_their_way_has_each_in_its_log_once"
_CORRUPTION = "tests/chaos/test_corruption.py"
_LOCAL = "tests/integration/test_launch_local.py"
_FAULTS = "tests/integration/test_launch_faults.py"
_ARENA = "tests/integration/test_arena_processes.py"
_RAY = "tests/integration/test_ray_wire.py"
_DISK = "tests/integration/test_plain_disk.py"
_DISKS = "tests/unit/checkpoint/test_disks.py"
_DCP = "tests/unit/checkpoint/test_dcp.py"
_S3 = "tests/unit/tier/test_bucket_s3.py"
_DEADLINE = "tests/unit/tier/test_deadline.py"
_ATTACKS = "tests/attacks/test_format_files.py"
_PLAIN = "tests/integration/test_plain_resume.py"
_CKPT = "tests/integration/test_launch_ckpt.py"
_KILLS = "tests/chaos/test_random_kills.py"
_SPREAD = "tests/integration/test_launch_spread.py"
_ANSWERS = "tests/unit/tier/test_answers.py"
_UPLOAD = "tests/unit/tier/test_upload.py"
_UPLOAD_KILLED = "tests/integration/test_upload_killed.py"

ELSEWHERE: tuple[tuple[str, str, str], ...] = (
    ("worker dies", "SIGKILL in a launch", _ENDS_AN_ATTEMPT),
    ("worker dies", "SIGKILL at every fault point", f"{_PLAIN}::test_plain_run_killed_resumes_bit_for_bit"),
    (
        "worker dies",
        "SIGKILL after every step of a slot's writer",
        f"{_ARENA}::test_writer_killed_after_any_step_leaves_only_whole_snapshots",
    ),
    (
        "worker stopped",
        "SIGSTOP in a launch: named as hung, replaced",
        f"{_FAULTS}::test_launch_worker_stopped_is_named_and_replaced_while_head_and_agent_die",
    ),
    (
        "worker stopped",
        "it keeps its slots until it is dead",
        f"{_ARENA}::test_slots_of_a_stopped_writer_are_not_taken_and_it_may_finish",
    ),
    (
        "reader stopped",
        "its lease holds, and dies with it",
        f"{_ARENA}::test_lease_of_a_stopped_reader_holds_and_dies_with_it",
    ),
    ("agent dies", "SIGKILL in a launch", _BESIDE_TRAINING),
    ("agent dies", "SIGKILL with a worker's events that no head has", _EVENTS),
    (
        "agent dies",
        "SIGKILL while it fills a slot for all nodes",
        f"{_SPREAD}::test_launch_whose_agent_dies_while_it_fills_reads_the_rest_from_the_bucket",
    ),
    (
        "agent dies",
        "SIGKILL in the middle of a payload's upload to S3: the next one sends the parts that are missing",
        f"{_UPLOAD_KILLED}::test_drain_agent_killed_in_mid_payload_the_next_one_sends_only_the_parts_that_are_missing",
    ),
    (
        "stale part",
        "in an upload that is taken over: another one's bytes under its number",
        f"{_UPLOAD}::test_upload_taken_over_sends_only_the_parts_that_the_store_does_not_prove",
    ),
    (
        "two agents",
        "upload one payload: the first, taken for dead, ends the upload or changes a part",
        f"{_UPLOAD}::test_upload_taken_over_that_its_writer_ends_meanwhile_is_sent_anew",
    ),
    ("head dies", "SIGKILL in a launch", _BESIDE_TRAINING),
    ("head dies", "SIGKILL with events in the log that it has not confirmed", _EVENTS),
    (
        "launcher dies",
        "SIGKILL",
        f"{_LOCAL}::test_launch_launcher_killed_takes_all_with_it_and_the_same_command_continues",
    ),
    (
        "any process dies",
        "SIGKILL at random moments",
        f"{_KILLS}::test_launch_processes_killed_at_random_moments_ends_with_the_same_losses",
    ),
    (
        "node lost",
        "all its processes, and its memory",
        f"{_FAULTS}::test_launch_loses_worker_node_and_all_resumes_from_the_tier_that_is_left",
    ),
    ("all nodes lost", "all processes, and all memory", _ENDS_AN_ATTEMPT),
    (
        "network cut",
        "Ray killed on all nodes",
        f"{_KINDS}::test_launch_ray_killed_on_all_nodes_trains_on_and_replicates_in_a_new_cluster",
    ),
    ("network cut", "Ray's head killed", f"{_RAY}::test_head_killed_is_said_once_and_a_new_generation_serves"),
    ("network cut", "the source of a pull stopped", f"{_RAY}::test_pull_with_stopped_source_ends_at_its_deadline"),
    (
        "network cut",
        "the source of a pull killed",
        f"{_RAY}::test_source_killed_in_mid_pull_is_unavailable_and_comes_back",
    ),
    (
        "bit flip in a payload",
        "in memory",
        f"{_CORRUPTION}::test_restore_slot_payload_spoilt_takes_the_next_copy_of_the_step",
    ),
    (
        "bit flip in a manifest",
        "in memory",
        f"{_CORRUPTION}::test_restore_slot_manifest_spoilt_takes_the_next_copy_of_the_step",
    ),
    (
        "bit flip",
        "in payload, manifest and record in the bucket",
        f"{_CORRUPTION}::test_restore_bucket_object_spoilt_takes_an_older_step",
    ),
    (
        "bit flip",
        "in every copy: exit code 3, nothing deleted",
        f"{_CORRUPTION}::test_restore_all_copies_spoilt_ends_with_exit_3_and_deletes_nothing",
    ),
    (
        "bit flip in a payload",
        "on a node's disk",
        f"{_DISK}::test_disk_with_a_flipped_bit_gives_the_older_step_and_names_the_copy",
    ),
    (
        "bit flip",
        "found by `ktrain ckpt verify`",
        f"{_CKPT}::test_ckpt_of_a_stopped_run_is_listed_and_a_flipped_bit_is_found_in_every_tier",
    ),
    (
        "bit flip, truncation",
        "any bit, any cut of a document",
        f"{_ATTACKS}::test_from_bytes_any_flipped_bit_or_cut_is_corruption",
    ),
    ("bit flip in a payload", "any bit", f"{_ATTACKS}::test_verify_payload_any_flipped_bit_is_corruption"),
    (
        "ENOSPC of the volume",
        "a real volume that is too small",
        f"{_ARENA}::test_acquire_of_more_than_the_volume_has_is_capacity_error_and_no_signal",
    ),
    (
        "EIO of the disk",
        "a folder that cannot be written",
        f"{_DISK}::test_disk_that_cannot_be_written_costs_only_itself",
    ),
    (
        "agent dies",
        "while it removes a step from its disk: marked, or manifests gone",
        f"{_DISKS}::test_agent_that_dies_while_it_removes_leaves_what_its_successor_finishes",
    ),
    (
        "collection races a reader",
        "a load through torch DCP",
        f"{_DCP}::test_load_holds_its_step_against_a_collector_from_its_metadata_to_its_last_byte",
    ),
    (
        "EIO of the bucket",
        "a file in place of its folder",
        f"{_KINDS}::test_launch_bucket_folder_gone_for_a_while_trains_on_and_drains_again",
    ),
    (
        "timeout of the bucket",
        "an S3 server stopped",
        f"{_KINDS}::test_launch_s3_server_stopped_for_a_while_trains_on_and_drains_again",
    ),
    (
        "timeout of the bucket",
        "a call that never returns",
        f"{_DEADLINE}::test_run_work_that_hangs_is_left_behind_and_reported_until_it_returns",
    ),
    ("403 to 503 from the bucket", "what each answer means", f"{_ANSWERS}::test_translate_answer_of_a_store_means"),
    (
        "403 to 503 from the bucket",
        "an S3 server that gives them",
        f"{_S3}::test_read_from_a_server_that_answers_with_a_status_keeps_the_meaning",
    ),
    (
        "slow drip from the bucket",
        "a throttling S3 server",
        f"{_S3}::test_read_from_a_throttling_server_stays_within_its_deadline",
    ),
    ("two heads", "a second launch of a live run", f"{_LOCAL}::test_launch_live_run_is_refused_by_name_and_cancelled"),
    (
        "any of these, in any order",
        "against a model of what must be restorable",
        "tests/model/test_checkpoint_model.py::TestJob",
    ),
)

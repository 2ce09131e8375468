"""JobSets: Jobs that start, end and restart together."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from ktrain.launcher.cluster.resources import SERVICE
from tests.unit.launcher.cluster.making import JOB, JOB_SET, POD, SPACE, Made, conditions, job_spec, jobset_spec

COUNTED = {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [42, 43]}}]}


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def workers(completions: int = 1, **more: Any) -> tuple[str, dict[str, Any]]:
    return "workers", job_spec(completions, **more)


def test_jobset_makes_jobs_pods_and_service_with_recorded_labels(made: Made) -> None:
    spec = jobset_spec(("head", job_spec(1)), workers(2), coordinator={"replicatedJob": "head"})
    made.create(JOB_SET, "a", spec)
    labels = made.pod("a-workers-0-1")["metadata"]["labels"]
    assert {name.removeprefix("jobset.sigs.k8s.io/"): value for name, value in labels.items() if "jobset." in name} == {
        "jobset-name": "a",
        "jobset-uid": made.get(JOB_SET, "a")["metadata"]["uid"],
        "replicatedjob-name": "workers",
        "replicatedjob-replicas": "1",
        "global-replicas": "2",
        "group-name": "default",
        "group-replicas": "2",
        "job-global-index": "1",
        "job-group-index": "1",
        "job-index": "0",
        "restart-attempt": "0",
        "coordinator": "a-head-0-0.a",
        "job-key": hashlib.sha1(b"space/a-workers-0").hexdigest(),
    }
    assert made.pod("a-head")["spec"]["subdomain"] == "a"
    service = made.get(SERVICE, "a")
    assert service["spec"]["selector"] == {"jobset.sigs.k8s.io/jobset-name": "a"}
    assert made.get(JOB_SET, "a")["status"]["replicatedJobsStatus"][1] == {
        "name": "workers",
        "ready": 1,
        "succeeded": 0,
        "failed": 0,
        "active": 1,
        "suspended": 0,
    }


def test_jobset_all_jobs_complete_is_completed(made: Made) -> None:
    made.create(JOB_SET, "a", jobset_spec(workers(2), ttlSecondsAfterFinished=30))
    made.exit("a-workers-0-0", 0)
    made.exit("a-workers-0-1", 0)
    jobset = made.get(JOB_SET, "a")
    assert conditions(jobset)["Completed"] == ("True", "AllJobsCompleted", "jobset completed successfully")
    assert jobset["status"]["terminalState"] == "Completed"
    made.pass_time(30)
    assert not made.store.list(JOB_SET).items
    assert not made.pods()


def test_jobset_success_of_the_head_ends_the_workers(made: Made) -> None:
    policy = {"operator": "All", "targetReplicatedJobs": ["head"]}
    made.create(JOB_SET, "a", jobset_spec(("head", job_spec(1)), workers(2), successPolicy=policy))
    made.exit("a-head", 0)
    made.cluster.step()
    assert "Completed" in conditions(made.get(JOB_SET, "a"))
    assert not made.runtime.running()
    assert [job["metadata"]["name"] for job in made.store.list(JOB).items] == ["a-head-0"]


def test_jobset_failed_job_restarts_all_until_the_budget_is_spent(made: Made) -> None:
    made.create(JOB_SET, "a", jobset_spec(("head", job_spec(1)), workers(1), failurePolicy={"maxRestarts": 1}))
    before = {pod["metadata"]["uid"] for pod in made.pods()}
    made.exit("a-workers", 3)
    made.cluster.step()
    jobset = made.get(JOB_SET, "a")
    assert (jobset["status"]["restarts"], jobset["status"]["restartsCountTowardsMax"]) == (1, 1)
    assert conditions(jobset)["RestartingJobSet"] == ("False", "JobsReady", "all jobs are ready")
    pods = made.pods()
    assert before.isdisjoint(pod["metadata"]["uid"] for pod in pods)
    assert {pod["metadata"]["labels"]["jobset.sigs.k8s.io/restart-attempt"] for pod in pods} == {"1"}
    made.exit("a-workers", 3)
    words = "jobset failed due to reaching max number of restarts (first failed job: a-workers-0)"
    assert conditions(made.get(JOB_SET, "a"))["Failed"] == ("True", "ReachedMaxRestarts", words)
    assert conditions(made.get(JOB_SET, "a"))["RestartingJobSet"] == ("False", "JobSetFailed", "jobset failed")


def test_jobset_rules_match_messages_in_order(made: Made) -> None:
    reasons = {"onJobFailureReasons": ["PodFailurePolicy"]}
    rules = [
        {"name": "bad", "action": "FailJobSet", "onJobFailureMessagePatterns": ["("]},
        {"name": "fatal", "action": "FailJobSet", "onJobFailureMessagePatterns": [".*exit code 42 .*"], **reasons},
        {
            "name": "planned",
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureMessagePatterns": ["exit code 43 "],
            "targetReplicatedJobs": ["workers"],
        },
    ]
    spec = jobset_spec(workers(1, podFailurePolicy=COUNTED), failurePolicy={"maxRestarts": 0, "rules": rules})
    made.create(JOB_SET, "a", spec)
    for restarts in (1, 2):
        made.exit("a-workers", 43)
        made.cluster.step()
        status = made.get(JOB_SET, "a")["status"]
        assert (status["restarts"], "restartsCountTowardsMax" in status) == (restarts, False)
    made.exit("a-workers", 42)
    words = "applying FailJobSet failure policy action (first failed job: a-workers-0)"
    assert conditions(made.get(JOB_SET, "a"))["Failed"] == ("True", "FailJobSetFailurePolicyAction", words)


@pytest.mark.parametrize(("strategy", "early"), [("Recreate", ["a-head-0-0"]), ("BlockingRecreate", [])])
def test_jobset_restart_waits_for_old_pods_as_the_strategy_says(
    tmp_path: Path, strategy: str, early: list[str]
) -> None:
    made = Made(tmp_path, exit_on_terminate=None)
    policy = {"maxRestarts": 1, "restartStrategy": strategy}
    made.create(JOB_SET, "a", jobset_spec(("head", job_spec(1)), workers(1), failurePolicy=policy))
    made.exit("a-head", 1)
    made.cluster.step()

    def new() -> list[str]:
        items = [pod for pod in made.pods() if pod["metadata"]["labels"]["jobset.sigs.k8s.io/restart-attempt"] == "1"]
        return [pod["spec"]["hostname"] for pod in items]

    assert new() == early
    made.pass_time(6)
    assert new() == ["a-head-0-0", "a-workers-0-0"]


def test_jobset_without_failure_policy_fails(made: Made) -> None:
    made.create(JOB_SET, "a", jobset_spec(workers(1)))
    made.exit("a-workers", 3)
    words = "jobset failed due to one or more job failures (first failed job: a-workers-0)"
    assert conditions(made.get(JOB_SET, "a"))["Failed"] == ("True", "FailedJobs", words)


@pytest.mark.parametrize("status", ["Ready", "Complete"])
def test_jobset_job_is_made_when_what_it_depends_on_has_come_so_far(made: Made, status: str) -> None:
    spec = jobset_spec(("driver", job_spec(1)), workers(1))
    spec["replicatedJobs"][1]["dependsOn"] = [{"name": "driver", "status": status}]
    made.create(JOB_SET, "a", spec)
    assert bool(made.pods("a-workers")) is (status == "Ready")
    made.exit("a-driver", 0)
    assert made.pods("a-workers")


def test_jobset_suspended_keeps_jobs_and_has_no_pods(made: Made) -> None:
    made.create(JOB_SET, "a", jobset_spec(workers(2), suspend=True))
    assert made.get(JOB, "a-workers-0")["spec"]["suspend"]
    assert made.get(JOB_SET, "a")["status"]["replicatedJobsStatus"][0]["suspended"] == 1
    for suspended in (False, True):
        made.store.mutate(JOB_SET, SPACE, "a", lambda obj, to=suspended: obj["spec"].update(suspend=to))
        made.cluster.step()
        assert len(made.runtime.running()) == (0 if suspended else 2)
    assert conditions(made.get(JOB_SET, "a"))["Suspended"] == ("True", "SuspendedJobs", "jobset is suspended")


def test_jobset_deleted_takes_everything_along(made: Made) -> None:
    made.create(JOB_SET, "a", jobset_spec(workers(2)))
    made.store.delete(JOB_SET, SPACE, "a", propagation="Foreground")
    made.cluster.step()
    assert not any(made.store.list(kind).items for kind in (JOB_SET, JOB, POD, SERVICE))
    assert not made.runtime.running()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"managedBy": "x/y"}, "spec.managedBy"),
        ({"startupPolicy": {"startupPolicyOrder": "InOrder"}}, "use dependsOn"),
        ({"failurePolicy": {"rules": [{"name": "a", "action": "RestartJob"}]}}, "the action RestartJob"),
        ({"failurePolicy": {"restartStrategy": "InPlaceRestart"}}, "the restart strategy InPlaceRestart"),
    ],
)
def test_jobset_that_is_not_honoured_fails_by_name(made: Made, more: dict[str, Any], words: str) -> None:
    made.create(JOB_SET, "a", jobset_spec(workers(1), **more))
    status, reason, message = conditions(made.get(JOB_SET, "a"))["Failed"]
    assert (status, reason) == ("True", "NotHonoured")
    assert words in message
    assert not made.pods()

"""What threads say to the system about themselves."""

from __future__ import annotations

import os
import threading

from ktrain.base.process import let_training_first


def test_thread_that_lets_training_first_is_a_batch_thread_and_no_other_is() -> None:
    found: list[int] = []

    def work() -> None:
        let_training_first()
        found.append(os.sched_getscheduler(0))
        inner = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
        inner.start()
        inner.join(30)

    before = os.sched_getscheduler(0)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert found == [os.SCHED_BATCH] * 2 and os.sched_getscheduler(0) == before

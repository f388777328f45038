"""The mailbox: order, wake-ups and races between two threads.

Three of these tests look at the semaphore or replace it, because a race cannot be provoked from outside.
"""

from __future__ import annotations

import threading

from tests.engine.toys import HOLD_SECONDS
from trio_runner.engine.mailbox import Cancel, Close, Mail, Mailbox, Pause, Resume


def test_mail_comes_in_the_order_it_was_put() -> None:
    mailbox = Mailbox()
    mail: list[Mail] = [Cancel(1), Pause(2), Resume(2), Close(), Cancel(3)]
    for item in mail:
        mailbox.put(item)
    assert mailbox.take() == mail
    assert mailbox.take() == []


def test_looking_for_mail_does_not_take_it() -> None:
    mailbox = Mailbox()
    assert not mailbox
    mailbox.put(Cancel(1))
    assert mailbox
    assert mailbox
    mailbox.take()
    assert not mailbox


def test_waiting_returns_at_once_when_there_is_mail() -> None:
    mailbox = Mailbox()
    for uid in range(3):
        mailbox.put(Cancel(uid))
        assert mailbox.take(wait=True) == [Cancel(uid)]


def test_wake_ups_do_not_pile_up() -> None:
    mailbox = Mailbox()
    for uid in range(100):
        mailbox.put(Cancel(uid))
    mailbox.take()
    assert not mailbox._arrived.acquire(blocking=False)


def test_no_wake_up_is_lost_between_two_threads() -> None:
    """Each letter is answered before the next is sent, so the reader sleeps as often as it can. After one lost
    wake-up, both would wait for ever."""
    there, back = Mailbox(), Mailbox()
    n_letters = 3000

    def answer() -> None:
        n_answered = 0
        while n_answered < n_letters:
            for mail in there.take(wait=True):
                back.put(mail)
                n_answered += 1

    answerer = threading.Thread(target=answer, daemon=True)
    answerer.start()

    received: list[object] = []

    def ask() -> None:
        for uid in range(n_letters):
            there.put(Cancel(uid))
            received.extend(back.take(wait=True))

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(HOLD_SECONDS)
    answerer.join(HOLD_SECONDS)
    assert not asker.is_alive()
    assert received == [Cancel(uid) for uid in range(n_letters)]


def test_two_writers_lose_nothing_and_each_keeps_its_order() -> None:
    mailbox = Mailbox()
    n_letters = 3000

    def write(first: int) -> None:
        for uid in range(first, first + n_letters):
            mailbox.put(Cancel(uid))

    writers = [threading.Thread(target=write, args=(first,), daemon=True) for first in (0, n_letters)]
    received: list[int] = []

    def read() -> None:
        while len(received) < 2 * n_letters:
            received.extend(mail.uid for mail in mailbox.take(wait=True) if isinstance(mail, Cancel))

    reader = threading.Thread(target=read, daemon=True)
    for thread in (reader, *writers):
        thread.start()
    reader.join(HOLD_SECONDS)
    assert not reader.is_alive()
    assert sorted(received) == list(range(2 * n_letters))
    for first in (0, n_letters):
        mine = [uid for uid in received if first <= uid < first + n_letters]
        assert mine == sorted(mine)


def take_in_a_thread(mailbox: Mailbox) -> tuple[threading.Thread, list[Mail]]:
    taken: list[Mail] = []
    thread = threading.Thread(target=lambda: taken.extend(mailbox.take(wait=True)), daemon=True)
    thread.start()
    return thread, taken


def test_mail_whose_wake_up_was_taken_with_the_mail_before_it() -> None:
    """It is put between the reader's look into the mailbox and its clearing of the wake-ups."""
    mailbox = Mailbox()

    class PutInBetween(threading.Semaphore):
        has_put = False

        def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
            if not blocking and not self.has_put:
                self.has_put = True
                mailbox.put(Cancel(2))
            return super().acquire(blocking, timeout)

    mailbox._arrived = PutInBetween(0)
    mailbox.put(Cancel(1))
    assert mailbox.take() == [Cancel(1)]
    thread, taken = take_in_a_thread(mailbox)
    thread.join(HOLD_SECONDS)
    assert taken == [Cancel(2)]


def test_mail_that_was_taken_before_its_wake_up_came() -> None:
    """The reader looks between the two halves of a put. The wake-up that follows wakes it for nothing."""
    mailbox = Mailbox()
    mailbox._mail.append(Cancel(1))
    assert mailbox.take() == [Cancel(1)]
    mailbox._arrived.release()
    thread, taken = take_in_a_thread(mailbox)
    mailbox.put(Cancel(2))
    thread.join(HOLD_SECONDS)
    assert taken == [Cancel(2)]

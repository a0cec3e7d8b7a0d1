"""The courier: `python -m kfdist.links.courier`, started by its rank and by nobody else.

It moves bytes between its rank and the owners, and heartbeats and commands between its rank and the controller, so that
the rank, whose data loaders fork, never loads gRPC. It holds caches only: the rank replaces it whenever it ends, and
hands it the unfinished jobs again.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections import deque
from dataclasses import replace

from kfdist.links import socket_messages
from kfdist.links.courier.dispatch import Dispatcher
from kfdist.links.courier.known_owners import OwnerDirectory
from kfdist.links.courier.session import ControllerSession
from kfdist.links.link import LinkCounters
from kfdist.links.shared_memory import HeartbeatWord
from kfdist.links.socket_messages import (
    Beat,
    Bye,
    Counted,
    CourierSetup,
    Done,
    Fenced,
    Hello,
    Message,
    NewSettings,
    Report,
    Submit,
    Taken,
)
from kfdist.system.lifetime import exit_with_process
from kfdist.telemetry.logging import setup_logging
from kfdist.telemetry.tracing import Tracing
from kfdist.types import RunSettings

_LOG = logging.getLogger(__name__)

_WORD_SECONDS = 0.2
_REPORT_SECONDS = 1.0


class RankSocket:
    """The courier's end of the socket pair, in an event loop."""

    def __init__(self, channel: socket.socket) -> None:
        """Takes over a connected socket."""
        channel.setblocking(False)
        self._channel = channel
        self._outbox: deque[bytes] = deque()
        self._readable = asyncio.Event()
        asyncio.get_running_loop().add_reader(channel, self._readable.set)

    def tell(self, message: Message) -> None:
        """Sends a message, later if the rank doesn't read at present."""
        self._outbox.append(socket_messages.encode(message))
        self._flush()

    def tell_settings(self, settings: RunSettings) -> None:
        """Sends new settings, whatever they name: a pause or stop must come through."""
        try:
            self.tell(NewSettings(settings=settings))
        except ValueError as error:  # of groups from an older controller, or its file
            _LOG.warning("all groups are inverted anew, not those asked for: %s", error)
            self.tell(NewSettings(settings=replace(settings, refresh=())))

    async def hear(self) -> tuple[Message, list[int]] | None:
        """Returns the next message and its descriptors; None when the rank has closed its end."""
        while True:
            self._readable.clear()
            try:
                return socket_messages.receive(self._channel)
            except BlockingIOError:
                await self._readable.wait()
            except ConnectionError:
                return None

    def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._outbox:
                socket_messages.send(self._channel, self._outbox[0])
                self._outbox.popleft()
        except BlockingIOError:
            loop.add_writer(self._channel, self._flush)
        except ConnectionError:
            self._outbox.clear()  # The rank has gone; `hear` says so, too.
            loop.remove_writer(self._channel)
        else:
            loop.remove_writer(self._channel)


class Courier:
    """One courier's parts, and what passes between them."""

    def __init__(self, setup: CourierSetup, rank: RankSocket, word: HeartbeatWord, tracing: Tracing) -> None:
        """Connects the parts; nothing runs yet."""
        directory = OwnerDirectory()
        self._rank = rank
        self._word = word
        self._counted = LinkCounters()
        self._fenced = False
        self._dispatcher = Dispatcher(
            setup,
            directory,
            done=self._tell_done,
            count=self._count,
            fenced=self._fence,
            tracing=tracing,
            controller_is_unheard=lambda: self._session.is_unheard,
        )
        self._session = ControllerSession(
            setup,
            directory,
            owners_changed=self._dispatcher.owners_changed,
            settings_changed=rank.tell_settings,
            count=self._count,
            fenced=self._fence,
            inversion_seconds=self._dispatcher.seconds,
        )

    async def run(self) -> None:
        """Carries until the rank says goodbye or closes its end."""
        async with asyncio.TaskGroup() as group:
            conversation = group.create_task(self._session.run())
            helpers = [
                conversation,
                group.create_task(self._session.keep_finding_owners()),
                group.create_task(self._move_word()),
                group.create_task(self._report_regularly()),
            ]
            self._rank.tell(Hello())
            while (heard := await self._rank.hear()) is not None:
                message, descriptors = heard
                match message:
                    case Submit():
                        self._dispatcher.submit(group, message, *descriptors)
                    case Taken():
                        self._dispatcher.taken(message)
                    case Beat():
                        self._session.beat(message.step, message.phase, message.samples)
                    case Report(in_force=in_force):
                        self._session.in_force = in_force
                    case Bye():
                        await self._session.end(conversation)
                        break
                    case _:
                        raise AssertionError(f"only couriers say {message!r}")
            for helper in helpers:
                helper.cancel()
            self._dispatcher.cancel_all()

    async def _move_word(self) -> None:
        while True:
            self._word.beat()
            await asyncio.sleep(_WORD_SECONDS)

    async def _report_regularly(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_SECONDS)
            self._report()

    def _count(self, more: LinkCounters) -> None:
        self._counted += more

    def _report(self) -> None:
        """Tells the rank what was counted since the last report, if anything was."""
        if self._counted != LinkCounters():
            self._rank.tell(Counted(counters=self._counted))
            self._counted = LinkCounters()

    def _tell_done(self, done: Done) -> None:
        self._report()  # first, so that the counts of a job are known with its result
        self._rank.tell(done)

    def _fence(self, reason: str) -> None:
        if not self._fenced:
            self._fenced = True
            _LOG.error("this start of the run is superseded and stops: %s", reason)
            self._rank.tell(Fenced())


async def _serve(channel_descriptor: int, word_descriptor: int, setup_descriptor: int) -> None:
    setup = CourierSetup.read(setup_descriptor)
    os.close(setup_descriptor)
    setup_logging(fields={"rank": setup.context.worker_rank})
    exit_with_process(setup.rank_pid, status=0)
    if os.getppid() != setup.rank_pid:
        return  # The rank had ended before we began to watch it.
    with HeartbeatWord(word_descriptor) as word:
        os.close(word_descriptor)
        tracing = Tracing("kfdist-courier", run=setup.context.run, rank=setup.context.worker_rank)
        await Courier(setup, RankSocket(socket.socket(fileno=channel_descriptor)), word, tracing).run()
        tracing.flush()


def main() -> None:
    """Runs the courier; its arguments are descriptors that the rank passed."""
    # torchrun and the terminal signal the whole group while ranks still write checkpoints: the rank alone ends us. Its
    # background thread, which may have started us, blocks all signals, and a child inherits that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    channel, word, setup = (int(argument) for argument in sys.argv[1:])
    asyncio.run(_serve(channel, word, setup))


if __name__ == "__main__":
    main()

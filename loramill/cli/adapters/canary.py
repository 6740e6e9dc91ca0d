"""`loramill adapters canary`: the share of the requests that the challenger answers."""

from __future__ import annotations

from typing import Annotated

import typer

from loramill.cli.adapters.rollouts import describe_answers
from loramill.cli.arguments import AdapterVersionArgument, JsonFlag
from loramill.cli.format import print_json, print_message, short_version, time_ago
from loramill.client import Client
from loramill.durations import DURATION_EXAMPLES, parse_duration
from loramill.types import RolloutKind, RolloutState, TrafficCounts


def canary(
    name: AdapterVersionArgument,
    share: Annotated[
        float | None, typer.Option(help="Share of the requests, 0 to 1, such as 0.1 for 10%.", show_default=False)
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Answer copies of the share instead, which are not sent.")
    ] = False,
    promote_after: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help=f"Promote the challenger after this time ({DURATION_EXAMPLES}) unless it is worse. Default: never; "
            "for an open canary, as before.",
            show_default=False,
        ),
    ] = None,
    end: Annotated[bool, typer.Option("--end", help="End the canary.")] = False,
    json: JsonFlag = False,
) -> None:
    """Let the challenger answer a share of the requests for an adapter, change that share, or end it.

    Each user gets answers of one version. If the challenger is much worse than the champion, the canary ends by itself.
    A version after the @ becomes the challenger first.
    """
    name, _, version = name.partition("@")
    _check_options(share, end=end, others=shadow or promote_after is not None or bool(version))
    seconds = None if promote_after is None else _read_time(promote_after)
    with Client() as client:
        if share is None:
            state = client.adapters.end_canary(name)
        else:
            state = client.adapters.start_canary(
                name, share, shadow=shadow, version=version or None, promote_after_seconds=seconds
            )
    if json:
        print_json(state)
    elif end:
        print_message(f"The champion answers all requests for {name} again. The canary: {_describe_counts(state)}.")
    else:
        print_message(f"{name}: {_describe_share(state)}.")


def describe_rollout(state: RolloutState) -> str:
    """Returns a rollout as one line: what it does or did, how it ended, and what it measured."""
    what = _describe_share(state) if state.ended_at is None else f"{state.kind} of {short_version(state.version)}"
    if state.outcome is not None:
        ended = "" if state.ended_at is None else f" {time_ago(state.ended_at)}"
        what += f", {state.outcome}{ended}: {state.reason}"
    return f"{what}; {_describe_counts(state)}"


def _describe_share(state: RolloutState) -> str:
    version = short_version(state.version)
    match state.kind:
        case RolloutKind.CANARY:
            return f"{version} answers {state.share:.0%} of the requests"
        case RolloutKind.SHADOW:
            return f"{version} answers copies of {state.share:.0%} of the requests"
        case RolloutKind.WATCH:
            return f"{version} is watched against {short_version(state.baseline)}"


def _describe_counts(state: RolloutState) -> str:
    """What was measured of both versions."""
    tried = f"{short_version(state.version)} {_describe_side(state.tried)}"
    return f"{tried}; {short_version(state.baseline)} {_describe_side(state.compared)}"


def _describe_side(counts: TrafficCounts) -> str:
    return describe_answers(counts.requests, counts.errors, counts.empty, counts.cut, counts.bad)


def _check_options(share: float | None, *, end: bool, others: bool) -> None:
    """Refuses options that contradict each other.

    Args:
        share: the option --share.
        end: the option --end.
        others: whether anything else than these two is given.
    """
    if end and (others or share is not None):
        raise typer.BadParameter(
            "it ends the present canary, and takes no other option and no version: give the name and --end alone.",
            param_hint="--end",
        )
    if not end and share is None:
        raise typer.BadParameter("give either --share, such as --share 0.1, or --end.")
    if share is not None and not 0 <= share <= 1:
        raise typer.BadParameter(
            f"it must be between 0 and 1, such as 0.1 for 10%, not {share:g}.", param_hint="--share"
        )


def _read_time(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.", param_hint="--promote-after") from error

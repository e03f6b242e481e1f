"""Kinds of blocks that several families share."""

from __future__ import annotations

from collections.abc import Mapping

from ditkit.seams.anatomy import Attention, Rows, Stack, Unit

# The order of two return values differs between families.
TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
TEXT_LAST = ("hidden_states", "encoder_hidden_states")

# The inner norms of the adaptive ones, which compute the modulation too.
ADA_NORMS = ("norm1.norm", "norm1_context.norm")
FEED_FORWARDS = (Unit("ff", bypass=("norm2",)), Unit("ff_context", bypass=("norm2_context",)))
SINGLE = Unit("proj_out", bypass=("norm.norm", "proj_mlp", "act_mlp", "attn"))


def double_stream(
    path: str, arguments: tuple[str, ...], returns: tuple[str, ...], token_rows: Mapping[str, Rows]
) -> Stack:
    """Blocks with weights of their own for text and for image, which attend jointly (MM-DiT)."""
    return Stack(
        path=path,
        arguments=arguments,
        units=(Unit("attn", bypass=ADA_NORMS), *FEED_FORWARDS),
        attention=(Attention("attn", "joint"),),
        returns=returns,
        token_rows=token_rows,
    )


def single_stream(
    path: str,
    arguments: tuple[str, ...],
    token_rows: Mapping[str, Rows],
    returns: tuple[str, ...] = ("hidden_states",),
) -> Stack:
    """Blocks with attention and feed-forward side by side, over text and image alike. When they return both
    they take both apart, too."""
    return Stack(
        path=path,
        arguments=arguments,
        units=(SINGLE,),
        attention=(Attention("attn", "joint"),),
        returns=returns,
        joint=len(returns) == 1,
        token_rows=token_rows,
    )

"""Whose limit a chat model's limit of new tokens is: the app's, or its class's own.

Some providers' classes fill in a limit that the app never set, such as the most that the model can
write. It is then no limit of the app's, and `max_new_tokens` counts.
"""

from __future__ import annotations

from langchain_core.language_models.chat_models import BaseChatModel

from marft_graph.rollout.asked import provider_of, warn_once

_MAYBE = (
    "node %r: its model is limited to %d new tokens, perhaps by its class and not by the app, so "
    "that max_new_tokens does not count there; cap_new_tokens makes it count"
)
_FALLBACKS = {"anthropic": 4096}
"""By provider: what its class fills in for models that it does not know."""


def limit_of_app(model: BaseChatModel, limit: int | None, node: str) -> int | None:
    """The limit that the app gave its model; None where the model's class filled it in.

    Args:
        model: the app's own model.
        limit: what the model says that its limit is.
        node: whose model it is. It is warned of a limit that may be either's.
    """
    if limit is None:
        return None
    fields = [
        name
        for name in type(model).model_fields
        if ("token" in name or name == "num_predict") and getattr(model, name) == limit
    ]
    if fields and not model.model_fields_set.intersection(fields):
        return None
    profile = getattr(model, "profile", None)
    if profile and profile.get("max_output_tokens") == limit:
        return None
    if _FALLBACKS.get(provider_of(model)) == limit:
        warn_once(node, _MAYBE, limit)
    return limit

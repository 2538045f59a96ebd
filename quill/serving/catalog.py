"""Which models may be called by name, and what is known of them without loading one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from quill.errors import InputError, NotFoundError, QuillError
from quill.registry import names
from quill.registry.store import Registry
from quill.registry.version import Version
from quill.serving.errors import ApiError, explain, invalid

# Looking at the registry costs a few system calls, and many clients poll.
_FRESH_FOR = 1.0
_MOST_CACHED = 1000


class Catalog:
    """The models of a registry that are served.

    Its methods read files: call them on a thread of their own.

    Args:
        registry: The registry.
        references: The models to serve, the first of which is the default; none: all of them.
        clock: Seconds that never go back.
    """

    def __init__(
        self,
        registry: Registry,
        references: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.registry, self._references, self._clock = registry, tuple(references), clock
        self._found: dict[str, tuple[float, Version]] = {}
        self._listed: tuple[float, list[Version]] | None = None

    def known(self, reference: str | None) -> Version | None:
        """The version that a request means, if it was just found; reads no file."""
        found = self._found.get(reference or "")
        return found[1] if found is not None and self._clock() - found[0] < _FRESH_FOR else None

    def find(self, reference: str | None) -> Version:
        """The version that a request means.

        Raises:
            ApiError: There is no such model, or none is named and there are several.
            QuillError: It is damaged.
        """
        if known := self.known(reference):
            return known
        found = self._resolve(reference or self._default())
        if len(self._found) >= _MOST_CACHED:
            self._found.clear()
        self._found[reference or ""] = self._clock(), found
        return found

    def list(self, *, all_versions: bool = False) -> list[Version]:
        """The newest version of each model that is served, or all of them; damaged ones are left out."""
        if not all_versions and self._listed and self._clock() - self._listed[0] < _FRESH_FOR:
            return self._listed[1]
        models = self.registry.models(all_versions=all_versions)
        models += self.registry.shipped_models(all_versions=all_versions)
        found = [v for m in models for v in m.versions if not v.damaged and self._serves(v)]
        if not all_versions:
            self._listed = self._clock(), found
        return found

    def describe(self, version: Version, name: str, *, loaded: bool = False) -> dict[str, Any]:
        """What /v1/models says of a version.

        Args:
            version: The version.
            name: What clients call it.
            loaded: Whether it is in memory.
        """
        created = version.facts["created"]
        model = version.config().get("model", {})
        return {
            "id": name,
            "object": "model",
            "created": int(datetime.fromisoformat(created).timestamp()) if created else 0,
            "owned_by": "quill",
            "max_model_len": model.get("block_size"),
            "quill": {
                "reference": version.reference,
                "digest": version.digest,
                "parameters": version.facts["parameters"],
                "block": model.get("block"),
                "layers": model.get("n_layer"),
                "val_loss": version.facts["best_val_loss"],
                "loaded": loaded,
            },
        }

    def _resolve(self, reference: str) -> Version:
        # A path would let a client read any folder.
        if names.is_path(reference):
            raise _unknown(reference)
        try:
            names.parse(reference)
        except InputError:
            raise _unknown(reference) from None
        try:
            found = self.registry.resolve(reference)
        except NotFoundError as e:
            raise explain(e) from None
        if not self._serves(found):
            raise _unknown(reference)
        return found

    def _serves(self, version: Version) -> bool:
        if not self._references or version.name in self._references:
            return True
        for reference in self._references:
            try:
                if self.registry.resolve(reference).reference == version.reference:
                    return True
            except QuillError:
                continue
        return False

    def _default(self) -> str:
        if self._references:
            return self._references[0]
        found = self.list()
        if len(found) == 1:
            return found[0].name
        raise invalid("the request names no model, and there is more than one", "model")


def _unknown(reference: str) -> ApiError:
    return ApiError(404, f"no model {reference[:80]!a}", "model_not_found", param="model")

"""Counts of a server, in the text form that Prometheus reads."""

from __future__ import annotations

import threading

_HELP = {
    "fot_http_responses_total": "Responses by route and status.",
    "fot_requests_running": "Answers that are being generated.",
    "fot_requests_waiting": "Answers that wait for a place.",
    "fot_prompt_tokens_total": "Tokens of prompts read.",
    "fot_completion_tokens_total": "Tokens generated.",
    "fot_model_seconds_total": "Time of the model, search in the memory included.",
    "fot_passages_seconds_total": "Time to find the passages of answers.",
    "fot_first_token_seconds_total": "Time from a request to its first token, summed.",
    "fot_first_tokens_total": "Answers that had a first token.",
    "fot_documents_waiting": "Uploaded documents that are not read yet.",
    "fot_document_tokens_total": "Tokens of uploaded documents read.",
    "fot_memory_bytes": "Bytes of a memory: pairs, indexes, text.",
    "fot_memory_tokens": "Tokens stored in a memory.",
}


class Metrics:
    """Numbers by name and labels; threads may share them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[str, float]] = {name: {} for name in _HELP}

    def add(self, name: str, amount: float, **labels: str) -> None:
        """Counts on."""
        with self._lock:
            values, key = self._values[name], _key(labels)
            values[key] = values.get(key, 0.0) + amount

    def set(self, name: str, value: float, **labels: str) -> None:
        """Says how much there is now."""
        with self._lock:
            self._values[name][_key(labels)] = value

    def text(self) -> str:
        """All of them, in format 0.0.4."""
        lines = []
        with self._lock:
            for name, values in self._values.items():
                lines.append(f"# HELP {name} {_HELP[name]}")
                lines.append(f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}")
                lines += [f"{name}{key} {value:.10g}" for key, value in sorted((values or {"": 0.0}).items())]
        return "\n".join(lines) + "\n"


def _key(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in sorted(labels.items())) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

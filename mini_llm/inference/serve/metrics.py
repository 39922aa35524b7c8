"""What the server counts, for Prometheus. No text of a request and no key is ever a label."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mini_llm_requests",
            "Requests answered, by route and status (499: the client went away)",
            ["route", "status"],
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "mini_llm_request_seconds",
            "Seconds from a request's headers to the end of its response",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_text_seconds = Histogram(
            "mini_llm_time_to_first_text_seconds",
            "Seconds from a valid request to the first text of its answer",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "mini_llm_prompt_tokens", "Tokens of valid prompts", registry=self.registry
        )
        self.generated_tokens = Counter(
            "mini_llm_generated_tokens",
            "Tokens generated for answers, end tokens included",
            registry=self.registry,
        )

    def watch(self, name: str, meaning: str, read: Callable[[], int]) -> None:
        """A gauge whose value ``read`` gives when it is asked for."""
        Gauge(f"mini_llm_{name}", meaning, registry=self.registry).set_function(read)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

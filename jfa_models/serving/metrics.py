"""/metrics: vLLM's names with `jfa:` in front, in the text format of Prometheus."""

from collections.abc import Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from jfa_models.serving.runner import Runner, Ticket

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_SECONDS_PER_TOKEN = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
_TOKENS = tuple(base * 10**power for power in range(6) for base in (1, 2, 5))


class Metrics:
    """Counts requests as they end, and reads the engine's counters when they are asked for."""

    def __init__(self, model: str):
        self.registry = CollectorRegistry(auto_describe=False)
        self._model = model
        names = ["model_name"]

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> prometheus_client.Histogram:
            made = prometheus_client.Histogram(f"jfa:{name}", text, names, buckets=buckets, registry=self.registry)
            return made.labels(model)

        self._first = histogram("time_to_first_token_seconds", "Time to the first token.", _SECONDS)
        self._between = histogram("inter_token_latency_seconds", "Mean time between tokens.", _SECONDS_PER_TOKEN)
        self._whole = histogram("e2e_request_latency_seconds", "Time from arrival to the last token.", _SECONDS)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._generated = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self._ended = prometheus_client.Counter(
            "jfa:request_success", "Choices that have ended.", [*names, "finished_reason"], registry=self.registry
        )

    def read(self, runner: Runner) -> None:
        """Adds the counters of an engine."""
        self.registry.register(_EngineCollector(runner, self._model))

    def count(self, ticket: Ticket) -> None:
        """Counts a request that has ended."""
        for result in ticket.latest:
            if result is None:
                self._ended.labels(self._model, "error" if ticket.error else "abort").inc()
                continue
            self._prompt.observe(len(result.prompt_token_ids))
            for one in result.outputs:
                reason = one.finish_reason or ("error" if ticket.error else "abort")
                self._ended.labels(self._model, reason).inc()
                self._generated.observe(len(one.token_ids))
            times = result.metrics
            if times is None or times.first_token is None:
                continue
            self._first.observe(times.first_token - times.arrival)
            longest = max(len(one.token_ids) for one in result.outputs)
            if times.finished is not None and result.finished:
                self._whole.observe(times.finished - times.arrival)
                if longest > 1:
                    self._between.observe((times.finished - times.first_token) / (longest - 1))

    def text(self) -> bytes:
        """The page. It waits for the step that runs."""
        return prometheus_client.generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, runner: Runner, model: str):
        self._runner, self._model = runner, model

    def collect(self) -> Iterator[Metric]:
        engine = self._runner.engine
        now = engine.metrics()
        hits = round(now.prefix_hits * now.prefix_tokens)
        drafts = now.speculation.values()
        gauges = (
            ("num_requests_running", "Sequences that run.", now.running),
            ("num_requests_waiting", "Sequences that wait for pages.", now.waiting),
            ("kv_cache_usage_perc", "Fraction of the pages in use, from 0 to 1.", now.cache_use),
        )
        counters = (
            ("num_preemptions", "Preemptions.", now.preemptions),
            ("prompt_tokens", "Tokens of prompts.", now.prompt_tokens),
            ("generation_tokens", "Generated tokens.", now.generated_tokens),
            ("prefix_cache_queries", "Tokens looked up in the prefix cache.", now.prefix_tokens),
            ("prefix_cache_hits", "Tokens found in the prefix cache.", hits),
            ("spec_decode_num_draft_tokens", "Drafted tokens.", sum(one.proposed for one in drafts)),
            ("spec_decode_num_accepted_tokens", "Accepted drafts.", sum(one.accepted for one in drafts)),
            ("engine_resets", "Resets after a failed step.", self._runner.num_resets),
        )
        for name, text, value in gauges:
            family = GaugeMetricFamily(f"jfa:{name}", text, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family
        for name, text, value in counters:
            family = CounterMetricFamily(f"jfa:{name}", text, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family
        adapters = InfoMetricFamily("jfa:lora_requests", "Loaded adapters.", labels=["model_name"])
        adapters.add_metric([self._model], {"adapters": ",".join(engine.model.adapters.names)})
        yield adapters

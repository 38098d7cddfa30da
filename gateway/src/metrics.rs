//! What Prometheus scrapes: base units, closed label sets, children looked up at load.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use http::StatusCode;
use prometheus::{
    GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};
use sealgate_policy::{Denial, Policy, Rule};

use crate::{
    limits::{ConcurrencyCounters, LoadLevel, PenaltyCounters, RateCounters},
    lock::lock,
    reload::CertificateRow,
    upstream::Upstreams,
    websocket::relay::{ReasonCounters, TunnelMetrics},
};

/// Seconds from the head of a request to the last byte of its answer.
const DURATION_BUCKETS: [f64; 12] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5, 10.0];

/// Lines of the log that could not be written. The log is older than any metric.
pub static LOST_LOG_LINES: AtomicU64 = AtomicU64::new(0);

/// The label of requests that no rule took on.
const NO_ROUTE: &str = "none";

macro_rules! metric {
    ($registry:expr, $metric:expr) => {{
        let metric = $metric?;
        $registry.register(Box::new(metric.clone()))?;
        metric
    }};
}

/// All metrics of the process.
pub struct Metrics {
    registry: Registry,
    connections: IntCounter,
    connections_open: IntGauge,
    connections_refused: IntCounterVec,
    accept_errors: IntCounter,
    handshakes: IntCounterVec,
    handshake_failures: IntCounterVec,
    plain_requests: IntCounterVec,
    acme_orders: IntCounterVec,
    acme_missing: IntGauge,
    requests: IntCounterVec,
    request_seconds: HistogramVec,
    denials: IntCounterVec,
    shadow_denials: IntCounterVec,
    penalties: IntCounterVec,
    blocked_addresses: IntGauge,
    concurrency: IntCounterVec,
    in_flight: IntGauge,
    load_level: IntGauge,
    rates: IntCounterVec,
    rate_overflows: IntCounter,
    lost_log_lines: IntCounter,
    upstream_errors: IntCounterVec,
    upstream_endpoints: IntGaugeVec,
    upstream_healthy: IntGaugeVec,
    upstream_available: IntGaugeVec,
    upstream_open_circuits: IntGaugeVec,
    upstream_openings: IntCounterVec,
    upstream_retries: IntCounterVec,
    sockets_open: IntGaugeVec,
    messages: IntCounterVec,
    message_bytes: IntCounterVec,
    message_refusals: IntCounterVec,
    closes: IntCounterVec,
    sessions: IntGauge,
    sessions_remembered: IntGauge,
    sessions_ended: IntCounterVec,
    reloads: IntCounterVec,
    reload_success: IntGauge,
    reload_time: IntGauge,
    generation: IntGauge,
    policy_info: IntGaugeVec,
    certificate_expiry: IntGaugeVec,
    jwks_age: GaugeVec,
    jwks_failures: IntGaugeVec,
    /// How it stands with other gateways.
    pub shared: SharedMetrics,
    /// How it stands with services that say what is revoked.
    pub sources: SourceMetrics,
}

/// Agreement with other gateways.
pub struct SharedMetrics {
    /// Whether Redis is connected.
    pub connected: IntGauge,
    /// Whether contact is lost.
    pub lost: IntGauge,
    /// Records that nobody of ours wrote.
    pub refused: IntCounter,
    heard: IntGauge,
    outbox: IntGauge,
    comparisons: IntCounterVec,
    lag: Histogram,
}

impl SharedMetrics {
    fn new(r: &Registry) -> prometheus::Result<Self> {
        let gauge = |name: &str, help: &str| IntGauge::new(name, help);
        Ok(Self {
            connected: metric!(r, gauge("sealgate_shared_connected", "Whether Redis is connected.")),
            lost: metric!(
                r,
                gauge("sealgate_shared_contact_lost", "Whether contact with other gateways is lost.")
            ),
            heard: metric!(
                r,
                gauge(
                    "sealgate_shared_last_contact_timestamp_seconds",
                    "When Redis last answered about news."
                )
            ),
            outbox: metric!(
                r,
                gauge("sealgate_shared_outbox", "Revocations that other gateways were not told of yet.")
            ),
            comparisons: metric!(
                r,
                IntCounterVec::new(
                    Opts::new(
                        "sealgate_shared_comparisons_total",
                        "Times that all revocations were compared with Redis', by cause."
                    ),
                    &["cause"]
                )
            ),
            refused: metric!(
                r,
                IntCounter::new(
                    "sealgate_shared_refused_records_total",
                    "Records in Redis that are not a gateway's."
                )
            ),
            lag: metric!(
                r,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "sealgate_shared_lag_seconds",
                        "From a revocation on one gateway to its arrival on this one, by their clocks."
                    )
                    .buckets(DURATION_BUCKETS.to_vec())
                )
            ),
        })
    }

    /// All revocations were compared with Redis'.
    pub fn read_all(&self, cause: &'static str) {
        self.comparisons.with_label_values(&[cause]).inc();
    }

    /// Redis answered, at `now` (unix seconds).
    pub fn heard_at(&self, now: u64) {
        self.heard.set(i64::try_from(now).unwrap_or(i64::MAX));
    }

    /// So many revocations wait to be published.
    pub fn waiting(&self, count: usize) {
        self.outbox.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// A revocation of another gateway took so long.
    pub fn lag(&self, lag: Duration) {
        self.lag.observe(lag.as_secs_f64());
    }
}

/// Services that say what is revoked, by their names in the policy.
pub struct SourceMetrics {
    connected: IntGaugeVec,
    lost: IntGaugeVec,
    heard: IntGaugeVec,
    events: IntCounterVec,
    snapshots: IntCounterVec,
    refused: IntCounterVec,
    lag: HistogramVec,
    known: Mutex<Vec<String>>,
}

impl SourceMetrics {
    fn new(r: &Registry) -> prometheus::Result<Self> {
        let gauges = |name: &str, help: &str| IntGaugeVec::new(Opts::new(name, help), &["source"]);
        let counters =
            |name: &str, help: &str, labels: &[&str]| IntCounterVec::new(Opts::new(name, help), labels);
        Ok(Self {
            connected: metric!(
                r,
                gauges("sealgate_revocation_source_connected", "Whether a source of revocations answers.")
            ),
            lost: metric!(
                r,
                gauges("sealgate_revocation_source_contact_lost", "Whether contact with a source is lost.")
            ),
            heard: metric!(
                r,
                gauges(
                    "sealgate_revocation_source_last_contact_timestamp_seconds",
                    "When everything that a source had was last known here."
                )
            ),
            events: metric!(
                r,
                counters(
                    "sealgate_revocation_source_events_total",
                    "Events of a source that were taken in.",
                    &["source"]
                )
            ),
            snapshots: metric!(
                r,
                counters(
                    "sealgate_revocation_source_snapshots_total",
                    "Times that all revocations of a source were read, by cause: the first time, a gap, another log.",
                    &["source", "cause"]
                )
            ),
            refused: metric!(
                r,
                counters(
                    "sealgate_revocation_source_refused_total",
                    "Answers of a source that are not the protocol's, and revocations for issuers that are not its own.",
                    &["source"]
                )
            ),
            lag: metric!(
                r,
                HistogramVec::new(
                    HistogramOpts::new(
                        "sealgate_revocation_source_lag_seconds",
                        "From a revocation at a source to its arrival here, by their clocks."
                    )
                    .buckets(DURATION_BUCKETS.to_vec()),
                    &["source"]
                )
            ),
            known: Mutex::default(),
        })
    }

    /// Only these sources are followed: others have no metrics.
    pub fn retain<'a>(&self, names: impl Iterator<Item = &'a str>) {
        let names: Vec<String> = names.map(str::to_owned).collect();
        let mut known = lock(&self.known);
        for gone in known.iter().filter(|name| !names.contains(name)) {
            // Some may have no child yet.
            let _ = self.connected.remove_label_values(&[gone.as_str()]);
            let _ = self.lost.remove_label_values(&[gone.as_str()]);
            let _ = self.heard.remove_label_values(&[gone.as_str()]);
            let _ = self.events.remove_label_values(&[gone.as_str()]);
            let _ = self.refused.remove_label_values(&[gone.as_str()]);
            let _ = self.lag.remove_label_values(&[gone.as_str()]);
            for cause in ["first", "gap", "rewritten"] {
                let _ = self.snapshots.remove_label_values(&[gone.as_str(), cause]);
            }
        }
        *known = names;
    }

    /// Whether a source answers.
    pub fn connected(&self, source: &str, connected: bool) {
        self.connected.with_label_values(&[source]).set(i64::from(connected));
    }

    /// Whether contact with it is lost.
    pub fn lost(&self, source: &str, lost: bool) {
        self.lost.with_label_values(&[source]).set(i64::from(lost));
    }

    /// Everything that it had is known, at `now` (unix seconds).
    pub fn heard(&self, source: &str, now: u64) {
        self.heard.with_label_values(&[source]).set(i64::try_from(now).unwrap_or(i64::MAX));
    }

    /// It told of a revocation.
    pub fn event(&self, source: &str) {
        self.events.with_label_values(&[source]).inc();
    }

    /// All of its revocations were read.
    pub fn copied(&self, source: &str, cause: &'static str) {
        self.snapshots.with_label_values(&[source, cause]).inc();
    }

    /// It said what it must not.
    pub fn refused(&self, source: &str) {
        self.refused.with_label_values(&[source]).inc();
    }

    /// A revocation took so long.
    pub fn lag(&self, source: &str, lag: Duration) {
        self.lag.with_label_values(&[source]).observe(lag.as_secs_f64());
    }
}

/// The children of one rule, looked up when its snapshot was built.
pub struct RuleMetrics {
    by_class: [IntCounter; 5],
    seconds: Histogram,
    /// WebSockets that are open now, and their messages.
    pub tunnel: Arc<TunnelMetrics>,
}

/// The children of all rules of a snapshot, by rule id; the last is for requests without a rule.
pub struct RouteMetrics(Box<[RuleMetrics]>);

impl RouteMetrics {
    /// The children for `rule`.
    #[must_use]
    #[expect(clippy::indexing_slicing, reason = "build() made one for each rule and one more")]
    pub fn of(&self, rule: Option<&Rule>) -> &RuleMetrics {
        let last = self.0.len() - 1;
        &self.0[rule.map_or(last, |rule| (rule.id.0 as usize).min(last))]
    }
}

impl RuleMetrics {
    /// Counts an answered request.
    pub fn request(&self, status: StatusCode, elapsed: Duration) {
        let class = usize::from(status.as_u16() / 100).clamp(1, 5) - 1;
        if let Some(counter) = self.by_class.get(class) {
            counter.inc();
        }
        self.seconds.observe(elapsed.as_secs_f64());
    }
}

/// The children of one upstream.
pub struct UpstreamCounters {
    /// Requests and upgrades that were not answered.
    pub unanswered: IntCounter,
    /// Times that a breaker opened.
    pub openings: IntCounter,
    /// Retries that brought an answer.
    pub retries_answered: IntCounter,
    /// Retries that brought none.
    pub retries_failed: IntCounter,
    /// Retries that the budget refused.
    pub retries_refused: IntCounter,
}

impl Metrics {
    /// Registers everything.
    ///
    /// # Errors
    ///
    /// A name was registered twice: a fault of this file.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let r = &registry;
        let counter = |name: &str, help: &str| IntCounter::new(name, help);
        let counters =
            |name: &str, help: &str, labels: &[&str]| IntCounterVec::new(Opts::new(name, help), labels);
        let gauge = |name: &str, help: &str| IntGauge::new(name, help);
        let gauges =
            |name: &str, help: &str, labels: &[&str]| IntGaugeVec::new(Opts::new(name, help), labels);

        let build = metric!(r, gauges("sealgate_build_info", "The running version.", &["version"]));
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        r.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        let metrics = Self {
            connections: metric!(r, counter("sealgate_connections_total", "Connections permitted.")),
            connections_open: metric!(
                r,
                gauge("sealgate_connections_open", "Connections open now, WebSockets included.")
            ),
            connections_refused: metric!(
                r,
                counters("sealgate_connections_refused_total", "Connections closed before TLS.", &["reason"])
            ),
            accept_errors: metric!(
                r,
                counter("sealgate_accept_errors_total", "Times that accepting failed for want of resources.")
            ),
            handshakes: metric!(
                r,
                counters("sealgate_tls_handshakes_total", "TLS handshakes finished.", &["version"])
            ),
            handshake_failures: metric!(
                r,
                counters(
                    "sealgate_tls_handshake_failures_total",
                    "TLS handshakes not finished.",
                    &["reason"]
                )
            ),
            plain_requests: metric!(
                r,
                counters(
                    "sealgate_plain_requests_total",
                    "Requests over plain HTTP: redirected, validated (asked by an ACME authority) or refused.",
                    &["outcome"]
                )
            ),
            acme_orders: metric!(
                r,
                counters(
                    "sealgate_acme_orders_total",
                    "Certificates that an ACME authority was asked for: issued or failed.",
                    &["authority", "outcome"]
                )
            ),
            acme_missing: metric!(
                r,
                IntGauge::new(
                    "sealgate_acme_certificates_missing",
                    "Certificates that an ACME authority is to issue and that are not there; their names are refused."
                )
            ),
            requests: metric!(
                r,
                counters(
                    "sealgate_http_requests_total",
                    "Requests answered, by class of status.",
                    &["route", "code"]
                )
            ),
            request_seconds: metric!(
                r,
                HistogramVec::new(
                    HistogramOpts::new(
                        "sealgate_http_request_duration_seconds",
                        "From the head of a request to the last byte of its answer."
                    )
                    .buckets(DURATION_BUCKETS.to_vec()),
                    &["route"]
                )
            ),
            denials: metric!(r, counters("sealgate_denials_total", "Requests refused.", &["reason"])),
            shadow_denials: metric!(
                r,
                counters(
                    "sealgate_shadow_denials_total",
                    "Requests and messages that a shadow rule would have refused.",
                    &["reason"]
                )
            ),
            rates: metric!(
                r,
                counters(
                    "sealgate_rate_decisions_total",
                    "What became of requests and messages that take from a rate.",
                    &["rate", "outcome"]
                )
            ),
            penalties: metric!(
                r,
                counters(
                    "sealgate_penalty_events_total",
                    "Failures that counted, waits that followed, attempts that were refused meanwhile.",
                    &["penalty", "event"]
                )
            ),
            concurrency: metric!(
                r,
                counters(
                    "sealgate_concurrency_decisions_total",
                    "What became of requests and WebSockets of which only so many may be under way.",
                    &["limit", "outcome"]
                )
            ),
            in_flight: metric!(r, gauge("sealgate_http_requests_in_flight", "Requests under way.")),
            load_level: metric!(
                r,
                gauge(
                    "sealgate_load_level",
                    "0 everybody is served, 1 whoever has a session, 2 nobody whose request or connection is new."
                )
            ),
            blocked_addresses: metric!(
                r,
                gauge("sealgate_blocked_addresses", "Addresses that may not connect for a time.")
            ),
            rate_overflows: metric!(
                r,
                counter(
                    "sealgate_rate_overflows_total",
                    "Times that a key shared a cell, because its part of the table was full: the table is too small, or flooded."
                )
            ),
            lost_log_lines: metric!(
                r,
                counter(
                    "sealgate_log_lines_lost_total",
                    "Lines of the log, audit records among them, that could not be written to stderr."
                )
            ),
            upstream_errors: metric!(
                r,
                counters(
                    "sealgate_upstream_errors_total",
                    "Requests and upgrades that a backend did not answer.",
                    &["upstream"]
                )
            ),
            upstream_endpoints: metric!(
                r,
                gauges("sealgate_upstream_endpoints", "Endpoints that an upstream has.", &["upstream"])
            ),
            upstream_healthy: metric!(
                r,
                gauges(
                    "sealgate_upstream_healthy_endpoints",
                    "Endpoints that the latest health check found fit, of upstreams that are checked.",
                    &["upstream"]
                )
            ),
            upstream_available: metric!(
                r,
                gauges(
                    "sealgate_upstream_available_endpoints",
                    "Endpoints that a request could be sent to: healthy, and not left alone by a breaker.",
                    &["upstream"]
                )
            ),
            upstream_open_circuits: metric!(
                r,
                gauges(
                    "sealgate_upstream_open_circuits",
                    "Endpoints that are left alone for having failed, or are being tried again.",
                    &["upstream"]
                )
            ),
            upstream_openings: metric!(
                r,
                counters(
                    "sealgate_upstream_circuit_openings_total",
                    "Times that an endpoint failed so often that it was left alone.",
                    &["upstream"]
                )
            ),
            upstream_retries: metric!(
                r,
                counters(
                    "sealgate_upstream_retries_total",
                    "Requests and upgrades that were sent to another endpoint: it answered, it failed too, or the budget refused it.",
                    &["upstream", "outcome"]
                )
            ),
            sockets_open: metric!(r, gauges("sealgate_websocket_open", "WebSockets open now.", &["route"])),
            messages: metric!(
                r,
                counters("sealgate_websocket_messages_total", "Messages let pass.", &["route", "direction"])
            ),
            message_bytes: metric!(
                r,
                counters(
                    "sealgate_websocket_message_bytes_total",
                    "Payload of messages let pass.",
                    &["route", "direction"]
                )
            ),
            message_refusals: metric!(
                r,
                counters("sealgate_websocket_refused_messages_total", "Messages refused.", &["reason"])
            ),
            closes: metric!(
                r,
                counters(
                    "sealgate_websocket_closes_total",
                    "WebSockets ended, by close code and by whom.",
                    &["code", "by"]
                )
            ),
            sessions: metric!(r, gauge("sealgate_sessions_live", "Sessions that run.")),
            sessions_remembered: metric!(
                r,
                gauge(
                    "sealgate_sessions_remembered",
                    "Sessions that run or have ended and are remembered until their tokens are gone."
                )
            ),
            sessions_ended: metric!(
                r,
                counters(
                    "sealgate_sessions_ended_total",
                    "Sessions ended before their lifetime, as far as this gateway knew them.",
                    &["reason"]
                )
            ),
            reloads: metric!(
                r,
                counters("sealgate_policy_reloads_total", "Attempts to load a policy.", &["result"])
            ),
            reload_success: metric!(
                r,
                gauge(
                    "sealgate_policy_last_reload_successful",
                    "Whether the last attempt to load a policy worked."
                )
            ),
            reload_time: metric!(
                r,
                gauge(
                    "sealgate_policy_last_reload_success_timestamp_seconds",
                    "When the policy in force was loaded."
                )
            ),
            generation: metric!(
                r,
                gauge("sealgate_policy_generation", "Counts the policies since the start.")
            ),
            policy_info: metric!(
                r,
                gauges("sealgate_policy_info", "SHA-256 of the policy in force.", &["hash"])
            ),
            certificate_expiry: metric!(
                r,
                gauges(
                    "sealgate_certificate_expiry_timestamp_seconds",
                    "When a certificate ends.",
                    &["name", "key"]
                )
            ),
            jwks_age: metric!(
                r,
                GaugeVec::new(
                    Opts::new("sealgate_jwks_age_seconds", "Since an issuer's keys were last read."),
                    &["issuer"]
                )
            ),
            jwks_failures: metric!(
                r,
                gauges(
                    "sealgate_jwks_failures",
                    "Times that an issuer's keys could not be read.",
                    &["issuer"]
                )
            ),
            shared: SharedMetrics::new(r)?,
            sources: SourceMetrics::new(r)?,
            registry: registry.clone(),
        };
        for denial in [Denial::SessionIdle, Denial::SessionReplaced] {
            metrics.sessions_ended(&denial, 0);
        }
        for reason in Denial::ALL_REASONS {
            metrics.denials.with_label_values(&[*reason]);
        }
        Ok(metrics)
    }

    /// The children of all rules of `policy`.
    #[must_use]
    pub fn routes(&self, policy: &Policy) -> RouteMetrics {
        let names = policy.route_names().map(|name| &**name).chain([NO_ROUTE]);
        RouteMetrics(names.map(|name| self.rule(name)).collect())
    }

    /// The children of a rate.
    #[must_use]
    pub fn rate(&self, name: &str) -> RateCounters {
        let outcome = |outcome| self.rates.with_label_values(&[name, outcome]);
        RateCounters {
            allowed: outcome("allowed"),
            refused: outcome("refused"),
            shadowed: outcome("shadowed"),
            unanswered: outcome("unanswered"),
        }
    }

    /// The children of a penalty.
    #[must_use]
    pub fn penalty(&self, name: &str) -> PenaltyCounters {
        let event = |event| self.penalties.with_label_values(&[name, event]);
        PenaltyCounters { failures: event("failure"), blocks: event("block"), refusals: event("refusal") }
    }

    /// The children of a limit of what is under way.
    #[must_use]
    pub fn concurrency(&self, name: &str) -> ConcurrencyCounters {
        let outcome = |outcome| self.concurrency.with_label_values(&[name, outcome]);
        ConcurrencyCounters {
            allowed: outcome("allowed"),
            refused: outcome("refused"),
            shadowed: outcome("shadowed"),
        }
    }

    /// The children of an upstream.
    #[must_use]
    pub fn upstream(&self, name: &str) -> UpstreamCounters {
        let retries = |outcome| self.upstream_retries.with_label_values(&[name, outcome]);
        UpstreamCounters {
            unanswered: self.upstream_errors.with_label_values(&[name]),
            openings: self.upstream_openings.with_label_values(&[name]),
            retries_answered: retries("answered"),
            retries_failed: retries("failed"),
            retries_refused: retries("refused"),
        }
    }

    /// How much is to be done.
    pub fn load(&self, in_flight: u32, level: LoadLevel) {
        self.in_flight.set(in_flight.into());
        self.load_level.set(level as i64);
    }

    /// So many addresses are blocked.
    pub fn addresses_blocked(&self, count: usize) {
        self.blocked_addresses.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// How often rates shared cells since the start.
    pub fn rates_overflowed(&self, times: u64) {
        self.rate_overflows.reset();
        self.rate_overflows.inc_by(times);
    }

    fn rule(&self, route: &str) -> RuleMetrics {
        let direction = |vec: &IntCounterVec, direction| vec.with_label_values(&[route, direction]);
        RuleMetrics {
            by_class: ["1xx", "2xx", "3xx", "4xx", "5xx"]
                .map(|class| self.requests.with_label_values(&[route, class])),
            seconds: self.request_seconds.with_label_values(&[route]),
            tunnel: Arc::new(TunnelMetrics {
                messages_to_upstream: direction(&self.messages, "to-upstream"),
                messages_to_client: direction(&self.messages, "to-client"),
                bytes_to_upstream: direction(&self.message_bytes, "to-upstream"),
                bytes_to_client: direction(&self.message_bytes, "to-client"),
                refused: ReasonCounters::prepare(|reason| self.message_refusals.with_label_values(&[reason])),
                shadowed: ReasonCounters::prepare(|reason| self.shadow_denials.with_label_values(&[reason])),
                open: self.sockets_open.with_label_values(&[route]),
            }),
        }
    }

    /// A connection was permitted.
    pub fn connection_opened(&self) {
        self.connections.inc();
    }

    /// A connection was refused.
    pub fn connection_refused(&self, reason: &'static str) {
        self.connections_refused.with_label_values(&[reason]).inc();
    }

    /// Accepting failed for want of resources.
    pub fn accept_failed(&self) {
        self.accept_errors.inc();
    }

    /// A handshake ended well.
    pub fn handshake_done(&self, version: &'static str) {
        self.handshakes.with_label_values(&[version]).inc();
    }

    /// A handshake did not.
    pub fn handshake_failed(&self, reason: &'static str) {
        self.handshake_failures.with_label_values(&[reason]).inc();
    }

    /// A request over plain HTTP was answered.
    pub fn plain_request(&self, outcome: &'static str) {
        self.plain_requests.with_label_values(&[outcome]).inc();
    }

    /// An ACME authority was asked for a certificate.
    pub fn acme_order(&self, authority: &str, issued: bool) {
        let outcome = if issued { "issued" } else { "failed" };
        self.acme_orders.with_label_values(&[authority, outcome]).inc();
    }

    /// So many certificates are to be had of ACME authorities and are not there.
    pub fn acme_missing(&self, count: u64) {
        self.acme_missing.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// A request was refused.
    pub fn denied(&self, reason: &'static str) {
        self.denials.with_label_values(&[reason]).inc();
    }

    /// A request was let pass that a shadow rule would have refused.
    pub fn shadow_denied(&self, reason: &'static str) {
        self.shadow_denials.with_label_values(&[reason]).inc();
    }

    /// A WebSocket ended. `code` is the close code as it went over the wire.
    pub fn closed(&self, code: u16, by: &'static str) {
        // A peer may send any of thousands of private codes: those that we do not know share a label.
        let label = match code {
            1000..=1015 | 4401 | 4403 | 4408..=4410 | 4412 | 4422 | 4429 => code.to_string(),
            _ => "other".to_owned(),
        };
        self.closes.with_label_values(&[label.as_str(), by]).inc();
    }

    /// So many sessions ended, for that reason.
    pub fn sessions_ended(&self, denial: &Denial, count: usize) {
        self.sessions_ended.with_label_values(&[denial.reason()]).inc_by(count as u64);
    }

    /// So many sessions run, so many are remembered.
    pub fn sessions(&self, live: usize, remembered: usize) {
        for (gauge, count) in [(&self.sessions, live), (&self.sessions_remembered, remembered)] {
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// How it stands with the endpoints of all upstreams, at `now`.
    pub fn endpoints(&self, upstreams: &Upstreams, now: Instant) {
        let gauges = [
            &self.upstream_endpoints,
            &self.upstream_healthy,
            &self.upstream_available,
            &self.upstream_open_circuits,
        ];
        // Of upstreams that are gone nothing is told.
        gauges.iter().for_each(|gauge| gauge.reset());
        let tell = |gauge: &IntGaugeVec, name: &str, count: usize| {
            gauge.with_label_values(&[name]).set(i64::try_from(count).unwrap_or(i64::MAX));
        };
        for upstream in upstreams.iter() {
            let members = upstream.members();
            tell(&self.upstream_endpoints, &upstream.name, members.count());
            tell(&self.upstream_available, &upstream.name, members.available(now));
            tell(&self.upstream_open_circuits, &upstream.name, members.broken());
            if members.health_interval().is_some() {
                tell(&self.upstream_healthy, &upstream.name, members.healthy());
            }
        }
    }

    /// A policy is in force.
    pub fn policy_loaded(&self, generation: u64, hash: &str, now: u64) {
        self.reloads.with_label_values(&["success"]).inc();
        self.reload_success.set(1);
        self.reload_time.set(i64::try_from(now).unwrap_or(i64::MAX));
        self.generation.set(i64::try_from(generation).unwrap_or(i64::MAX));
        self.policy_info.reset();
        self.policy_info.with_label_values(&[hash]).set(1);
    }

    /// The files say again what is in force.
    pub fn policy_confirmed(&self) {
        self.reload_success.set(1);
    }

    /// A policy was not taken; the one before stays.
    pub fn policy_failed(&self) {
        self.reloads.with_label_values(&["failure"]).inc();
        self.reload_success.set(0);
    }

    /// When the certificates of the snapshot end.
    pub fn certificates(&self, rows: &[CertificateRow]) {
        self.certificate_expiry.reset();
        for CertificateRow { names, key, expires_at, .. } in rows {
            let end = i64::try_from(*expires_at).unwrap_or(i64::MAX);
            self.certificate_expiry.with_label_values(&[names, key]).set(end);
        }
    }

    /// Everything in Prometheus' text format.
    ///
    /// # Errors
    ///
    /// A metric that cannot be written: a fault of this file.
    pub fn render<'a>(
        &self,
        connections_open: u32,
        keys: impl Iterator<Item = (&'a Arc<str>, Option<Duration>, u64)>,
    ) -> prometheus::Result<String> {
        self.connections_open.set(i64::from(connections_open));
        self.lost_log_lines.reset();
        self.lost_log_lines.inc_by(LOST_LOG_LINES.load(Ordering::Relaxed));
        self.jwks_age.reset();
        self.jwks_failures.reset();
        for (issuer, age, failures) in keys {
            if let Some(age) = age {
                self.jwks_age.with_label_values(&[&**issuer]).set(age.as_secs_f64());
            }
            self.jwks_failures
                .with_label_values(&[&**issuer])
                .set(i64::try_from(failures).unwrap_or(i64::MAX));
        }
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

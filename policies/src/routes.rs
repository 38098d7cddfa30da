//! Host, path and method → rule.

use std::collections::HashMap;
use std::sync::Arc;

use http::Method;

use crate::denial::Denial;
use crate::path::{PathPattern, Segment, canonical_path};
use crate::rule::Rule;

/// Finds the rule for host, path and method.
///
/// An exact host comes before a wildcard, a wildcard before any; within a host a literal segment comes before a
/// parameter, a parameter before `**`.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    exact: HashMap<Box<str>, Node>,
    /// `*.example.com` stands here as `example.com`; the star is exactly one label, as in certificates (RFC 6125).
    wildcard: HashMap<Box<str>, Node>,
    any: Option<Node>,
}

/// One segment of the paths of one host, and what may follow it.
#[derive(Debug, Default)]
struct Node {
    literals: HashMap<Box<str>, Node>,
    parameter: Option<Box<Node>>,
    /// `**`: whatever follows.
    tree: Option<Slot>,
    /// The path ends here.
    end: Option<Slot>,
}

/// The rules of one path pattern.
#[derive(Debug, Default)]
struct Slot {
    /// The path itself, if it has no parameter: matched requests share it instead of copying.
    literal: Option<Arc<str>>,
    methods: Vec<(Method, Arc<Rule>)>,
    websocket: Option<Arc<Rule>>,
}

/// A path in canonical form: what was judged is what is forwarded.
#[derive(Debug, Clone)]
pub(crate) enum CanonicalPath {
    /// Equal to a rule's literal path.
    Literal(Arc<str>),
    /// From the request.
    Own(Box<str>),
}

impl CanonicalPath {
    pub(crate) fn as_str(&self) -> &str {
        match self {
            Self::Literal(path) => path,
            Self::Own(path) => path,
        }
    }
}

impl Routes {
    /// # Errors
    /// The [`Denial`] for a malformed path, unknown host, unknown path or wrong method.
    pub(crate) fn find(
        &self,
        host: &str,
        method: &Method,
        path: &str,
        websocket: bool,
    ) -> Result<(&Arc<Rule>, CanonicalPath), Denial> {
        let path = canonical_path(path)?;
        let wildcard = host.split_once('.').and_then(|(_, parent)| self.wildcard.get(parent));
        let tables = [self.exact.get(host), wildcard, self.any.as_ref()];
        if tables.iter().all(Option::is_none) {
            return Err(Denial::Misdirected);
        }
        let slots = || tables.iter().flatten().filter_map(|table| table.find(path.strip_prefix('/')));
        for slot in slots() {
            if let Some(rule) = slot.rule(method, websocket) {
                let path = match &slot.literal {
                    Some(literal) => CanonicalPath::Literal(Arc::clone(literal)),
                    None => CanonicalPath::Own(path.into()),
                };
                return Ok((rule, path));
            }
        }
        Err(no_rule(slots(), method, websocket))
    }

    /// Exact hosts and wildcards, in order.
    pub(crate) fn hosts(&self) -> Vec<String> {
        let wildcards = self.wildcard.keys().map(|parent| format!("*.{parent}"));
        let mut hosts: Vec<_> = self.exact.keys().map(ToString::to_string).chain(wildcards).collect();
        hosts.sort();
        hosts
    }

    /// Adds a rule under one of its hosts; `None` for methods makes it the path's WebSocket.
    ///
    /// # Errors
    /// The rule that already stands there.
    pub(crate) fn insert(
        &mut self,
        host: Host,
        path: &PathPattern,
        methods: Option<&[Method]>,
        rule: &Arc<Rule>,
    ) -> Result<(), Arc<Rule>> {
        let node = match host {
            Host::Exact(name) => self.exact.entry(name).or_default(),
            Host::Wildcard(parent) => self.wildcard.entry(parent).or_default(),
            Host::Any => self.any.get_or_insert_default(),
        };
        let slot = node.slot(&path.segments);
        slot.literal.clone_from(&path.literal);
        let Some(methods) = methods else {
            return slot.websocket.replace(Arc::clone(rule)).map_or(Ok(()), Err);
        };
        for method in methods {
            if let Some((_, other)) = slot.methods.iter().find(|(known, _)| known == method) {
                return Err(Arc::clone(other));
            }
            slot.methods.push((method.clone(), Arc::clone(rule)));
        }
        Ok(())
    }
}

impl Node {
    /// Goes as far into literals as possible, comes back for parameters, then for trees. Takes at most as many steps
    /// as the policy has segments.
    fn find(&self, path: Option<&str>) -> Option<&Slot> {
        let Some(path) = path else { return self.end.as_ref() };
        let (segment, rest) = match path.split_once('/') {
            Some((segment, rest)) => (segment, Some(rest)),
            None => (path, None),
        };
        let literal = || self.literals.get(segment)?.find(rest);
        // A parameter is something; the end of `/users/` is not.
        let parameter = || self.parameter.as_ref().filter(|_| !segment.is_empty())?.find(rest);
        literal().or_else(parameter).or(self.tree.as_ref())
    }

    fn slot(&mut self, pattern: &[Segment]) -> &mut Slot {
        match pattern {
            [] => self.end.get_or_insert_default(),
            [Segment::Tree, ..] => self.tree.get_or_insert_default(),
            [Segment::Parameter, rest @ ..] => self.parameter.get_or_insert_default().slot(rest),
            [Segment::Literal(name), rest @ ..] => self.literals.entry(name.clone()).or_default().slot(rest),
        }
    }
}

/// Why no rule was found, given the slots whose path matched.
fn no_rule<'s>(slots: impl Iterator<Item = &'s Slot>, method: &Method, websocket: bool) -> Denial {
    let slots: Vec<_> = slots.collect();
    let mut methods: Vec<_> =
        slots.iter().flat_map(|slot| &slot.methods).map(|(method, _)| method.as_str()).collect();
    if methods.contains(&"GET") {
        methods.push("HEAD");
    }
    methods.sort_unstable();
    methods.dedup();
    let has_websocket = slots.iter().any(|slot| slot.websocket.is_some());
    if slots.is_empty() {
        Denial::NoRoute
    } else if websocket && has_websocket {
        Denial::MethodNotAllowed { allow: "GET".into() }
    } else if websocket {
        Denial::NoWebsocket
    } else if has_websocket && (methods.is_empty() || method == Method::GET) {
        Denial::UpgradeRequired
    } else {
        Denial::MethodNotAllowed { allow: methods.join(", ").into() }
    }
}

impl Slot {
    fn rule(&self, method: &Method, websocket: bool) -> Option<&Arc<Rule>> {
        if websocket {
            // RFC 6455 §4.1 opens with GET, RFC 8441 §4 with CONNECT.
            let opens = method == Method::GET || method == Method::CONNECT;
            return self.websocket.as_ref().filter(|_| opens);
        }
        let find = |method: &Method| self.methods.iter().find(|(known, _)| known == method);
        // Whoever may GET may HEAD (RFC 9110 §9.3.2).
        let found = find(method).or_else(|| if method == Method::HEAD { find(&Method::GET) } else { None });
        found.map(|(_, rule)| rule)
    }
}

/// A host pattern.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Host {
    Exact(Box<str>),
    Wildcard(Box<str>),
    Any,
}

impl Host {
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        const EXPECTED: &str = "expected \"*\", a host name in lower case without port, or \"*.\" and one";
        let label = |label: &str| {
            !label.is_empty()
                && label
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
        };
        let name = |name: &str| name.len() <= 253 && name.split('.').all(label);
        // An IPv6 literal stands in brackets in `Host`.
        let ipv6 = |text: &str| {
            text.strip_prefix('[')
                .and_then(|text| text.strip_suffix(']'))
                .is_some_and(|text| text.parse::<std::net::Ipv6Addr>().is_ok_and(|a| a.to_string() == text))
        };
        match text.strip_prefix("*.") {
            _ if text == "*" => Ok(Self::Any),
            Some(parent) if name(parent) => Ok(Self::Wildcard(parent.into())),
            None if name(text) || ipv6(text) => Ok(Self::Exact(text.into())),
            _ => Err(EXPECTED),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts() {
        for good in ["*", "a", "a.example", "*.a.example", "127.0.0.1", "[::1]", "xn--a_b"] {
            assert!(Host::parse(good).is_ok(), "{good}");
        }
        for bad in ["", "A", "a:1", "a..b", "a.*", "*.", "**", "[::01]", "::1", "é", "*.*.a"] {
            assert!(Host::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_path_with_many_ways_is_found_in_few_steps() {
        // Literals and parameters that branch at every segment, and none that fits at the end.
        let mut root = Node::default();
        let both = [Segment::Literal("a".into()), Segment::Parameter];
        for bits in 0..1_usize << 10 {
            let pattern: Vec<_> = (0..10).map(|bit| both[bits >> bit & 1].clone()).collect();
            root.slot(&pattern);
        }
        let path = ["a"; 10].join("/");
        assert!(root.find(Some(&path)).is_some());
        assert!(root.find(Some(&format!("{path}/a"))).is_none());
        assert!(root.find(Some(&"a/".repeat(2_000))).is_none());
    }
}

use std::borrow::Cow;
use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::bundle::Bundle;
use crate::identity::IdentityParts;
use crate::policy::Policy;

const HEAD: &str = r#"
version = 1
[[issuer]]
name = "i"
issuer = "https://i.example"
audience = ["a"]
algorithms = ["ES256"]
jwks = "file:jwks.json"
[[upstream]]
name = "u"
endpoints = ["unix:/u"]
"#;

const ROUTE: &str = r#"
[[route]]
name = "room"
path = "/rooms/{room}"
methods = ["GET"]
upstream = "u"
action = "room.read"
resource = { type = "Room", id = "path:room" }
"#;

const SCHEMA: &str = r#"
entity Role;
entity User in [Role] { issuer: String, department?: String, acr?: String, amr: Set<String>, login_age?: Long };
type Circumstances = { address: ipaddr, tls_version: String, client_certificate: Bool, token_age?: Long, now: datetime,
  hour: Long, weekday: Long };
entity Route;
entity Room;
entity Desk { department: String, owner: User };
action "rooms";
action "room.read" in ["rooms"] appliesTo { principal: User, resource: Room, context: Circumstances };
action "desk.read" appliesTo { principal: User, resource: Desk, context: Circumstances };
action "open" appliesTo { principal: User, resource: Route, context: Circumstances };
"#;

fn compile(toml: &str, cedar: &str, schema: &str) -> Result<Policy, crate::errors::PolicyErrors> {
    let files = [("policy.toml", toml), ("authz.cedar", cedar), ("authz.cedarschema", schema)];
    let files = files.into_iter().filter(|(_, text)| !text.is_empty());
    let files = files.map(|(name, text)| (name.to_owned(), text.as_bytes().to_owned())).collect();
    Policy::compile(&Bundle { root: "/b".into(), files }, &BTreeMap::new())
}

fn errors(toml: &str, cedar: &str, schema: &str) -> Vec<String> {
    let errors = compile(toml, cedar, schema).map(drop).unwrap_err();
    errors
        .0
        .iter()
        .map(|it| format!("{}:{}:{}: {}: {}", it.file, it.line, it.column, it.key, it.message))
        .collect()
}

/// A decision on a resource of the type, with everything that it may have.
fn decision(cedar: &str, action: &str, kind: &str) -> Decision {
    let files = [("authz.cedar", cedar), ("authz.cedarschema", SCHEMA)];
    let files = files.map(|(name, text)| (name.to_owned(), text.as_bytes().to_owned())).into();
    let (authz, errors) = Authz::read(&Bundle { root: "/b".into(), files });
    assert!(errors.is_empty(), "{errors:?}");
    let more = || (kind == "Desk").then_some(Field::Path(1));
    let resource =
        ResourceRule { kind: kind.parse().unwrap(), id: Field::Path(0), department: more(), owner: more() };
    authz.unwrap().decision(action, resource, &mut SharedJudges::default()).unwrap()
}

fn found(id: &'static str, department: &'static str, owner: &'static str) -> Found<'static> {
    Found { id: id.into(), department: Some(department.into()), owner: Some(owner.into()) }
}

#[test]
fn what_is_wrong_with_policies_is_told_with_what_is_wrong_beside_them() {
    let toml = format!(
        "{HEAD}{}",
        ROUTE.replace("room.read", "room.raed").replace("upstream = \"u\"", "upstream = \"v\"")
    );
    let good = "@id(\"p\")\npermit (principal, action == Action::\"room.read\", resource);\n";
    let all = errors(&toml, good, SCHEMA);
    assert!(all.iter().any(|it| it.contains("did you mean `room.read`?")), "{all:?}");
    assert!(all.iter().any(|it| it.contains("unknown upstream `v`")), "{all:?}");
    let toml = format!("{HEAD}{ROUTE}");
    assert!(compile(&toml, good, SCHEMA).is_ok());
    let unknown_upstream = toml.replace("upstream = \"u\"", "upstream = \"v\"");
    for (cedar, place, part) in [
        ("@id(\"p\")\npermit (principal, action, resourse);", "authz.cedar:2:", "resourse"),
        (
            "@id(\"p\")\npermit (principal, action, resource)\n  when { principal.rank > 3 };",
            "authz.cedar:3:",
            "rank",
        ),
        ("@id(\"p\")\npermit (principal, action == Action::\"x\", resource);", "authz.cedar:", "x"),
        ("@id(\"p\") permit (principal is Room, action, resource);", "authz.cedar:1:", "unable to find"),
        ("\npermit (principal, action, resource);", "authz.cedar:2:1", "expected @id"),
        (
            "@id(\"p\") permit (principal, action, resource);\n@id(\"p\") forbid (principal, action, resource);",
            "authz.cedar:2:1",
            "`p` is defined twice; first at authz.cedar:1",
        ),
        ("@id(\"p\") permit (principal == ?principal, action, resource);", "authz.cedar:1:1", "template"),
        (
            "@id(\"p\")\npermit (principal, action, resource)\n  when { context.hour == \"9\" };",
            "authz.cedar:3:",
            "",
        ),
    ] {
        let all = errors(&unknown_upstream, cedar, SCHEMA);
        assert!(all.iter().any(|it| it.starts_with(place) && it.contains(part)), "{cedar}: {all:?}");
        assert!(all.iter().any(|it| it.starts_with("policy.toml:")), "{cedar}: {all:?}");
    }
    let all = errors(&toml, good, "entity Role;\nentity User in [Rolle];");
    assert!(all.iter().any(|it| it.starts_with("authz.cedarschema:2:")), "{all:?}");
    let all = errors(&toml, good, "");
    assert!(
        all.iter().any(|it| it.starts_with("authz.cedarschema:1:1") && it.contains("come together")),
        "{all:?}"
    );
    let all = errors(&toml, "", SCHEMA);
    assert!(
        all.iter().any(|it| it.starts_with("authz.cedar:1:1") && it.contains("come together")),
        "{all:?}"
    );
}

#[test]
fn a_rule_asks_what_the_schema_knows() {
    let good = "@id(\"p\") permit (principal, action, resource);";
    let websocket = r#"
[[websocket]]
name = "w"
path = "/w/{room}"
upstream = "u"
action = "open"
[[websocket.message]]
type = "read"
direction = "to-upstream"
action = "room.read"
resource = { type = "Room", id = "message:/room" }
[[websocket.message]]
type = "beat"
direction = "to-upstream"
"#;
    let toml = format!("{HEAD}{ROUTE}{websocket}");
    assert!(compile(&toml, good, SCHEMA).is_ok());
    let resource = "resource = { type = \"Room\", id = \"path:room\" }";
    for (from, to, part) in [
        (
            "action = \"room.read\"\nresource = { type = \"Room\", id = \"path:room\" }\n",
            "",
            "expected an action: authz.cedar decides",
        ),
        (
            "action = \"room.read\"\nresource = { type = \"Room\", id = \"path:room\" }",
            resource,
            "expected an action too",
        ),
        (resource, "", "`room.read` does not apply to a Route; there are Room"),
        (resource, "resource = { type = \"User\", id = \"path:room\" }", "is no resource"),
        (resource, "resource = { type = \"Ro om\", id = \"path:room\" }", "expected an entity type"),
        (
            resource,
            "resource = { type = \"Desk\", id = \"path:room\" }",
            "`room.read` does not apply to a Desk",
        ),
        (resource, "resource = { type = \"Room\", id = \"path:rom\" }", "the path has no `{rom}`"),
        (resource, "resource = { type = \"Room\", id = \"query:room\" }", "the rule takes no query"),
        (resource, "resource = { type = \"Room\", id = \"body:/room\" }", "the body is not looked into"),
        (resource, "resource = { type = \"Room\", id = \"message:/room\" }", "only for messages"),
        (resource, "resource = { type = \"Room\", id = \"room\" }", "expected \"path:NAME\""),
        (resource, "resource = { type = \"Room\", id = \"path:\" }", "expected \"path:NAME\""),
        (resource, "resource = { type = \"Room\", id = \"path:room\", owner = \"path:room\" }", "owner"),
        ("\"message:/room\"", "\"query:room\"", "a message has no query and no body"),
        ("\"message:/room\"", "\"message:room\"", "expected a JSON pointer"),
        ("action = \"open\"", "action = \"opne\"", "did you mean `open`?"),
        ("action = \"open\"", "auth = \"none\"\nresource = { type = \"Route\" }", "auth is \"none\""),
    ] {
        assert!(toml.contains(from), "{from}");
        let all = errors(&toml.replacen(from, to, 1), good, SCHEMA);
        assert!(all.iter().all(|it| it.starts_with("policy.toml:")), "{all:?}");
        assert!(all.iter().any(|it| it.contains(part)), "{to}: {all:?}");
    }
    let without = errors(&format!("{HEAD}{ROUTE}"), "", "");
    assert!(without.iter().any(|it| it.contains("there is no authz.cedar")), "{without:?}");
    let desk = "action = \"desk.read\"\nresource = { type = \"Desk\", id = \"path:room\", department = \"path:room\" }";
    let all = errors(
        &format!("{HEAD}{ROUTE}").replace(&format!("action = \"room.read\"\n{resource}"), desk),
        good,
        SCHEMA,
    );
    assert!(all.iter().any(|it| it.contains("owner")), "what the schema requires is missing: {all:?}");
}

#[test]
fn roles_that_exclude_each_other() {
    let toml = |roles: &str| {
        format!("{HEAD}{}{roles}", ROUTE.replace("resource = { type = \"Room\", id = \"path:room\" }", ""))
    };
    for (roles, part) in [
        ("[[role]]\nname = \"a\"\nexcludes = [\"a\"]\n", "cannot exclude itself"),
        ("[[role]]\nname = \"a\"\nexcludes = [\"b\", \"b\"]\n", "stands twice"),
        ("[[role]]\nname = \"a\"\n", "expected require_amr or excludes"),
    ] {
        let all = errors(&toml(roles), "", "");
        assert!(all.iter().any(|it| it.contains(part)), "{all:?}");
    }
    assert!(compile(&toml("[[role]]\nname = \"a\"\nexcludes = [\"b\"]\n"), "", "").is_ok());
}

/// Policies that use every kind of test that a table may be made of.
const TABULATED: &str = r#"
@id("reader") permit (principal in Role::"reader", action in Action::"rooms", resource);
@id("strong") permit (principal, action == Action::"room.read", resource is Room)
  when { principal has acr && ["high", "mfa"].contains(principal.acr) && principal.amr.contains("otp") };
@id("fresh") permit (principal, action == Action::"room.read", resource)
  when { principal has login_age && principal.login_age < 300 && principal.amr.containsAny(["hwk", "swk"]) };
@id("banned") forbid (principal, action in [Action::"room.read", Action::"desk.read"], resource)
  when { principal in [Role::"banned"] };
@id("low") forbid (principal, action == Action::"room.read", resource)
  when { principal has acr && principal.acr == "low" && principal has login_age && 3600 <= principal.login_age };
@id("desk") permit (principal, action == Action::"desk.read", resource)
  when { (principal has department && principal.department == resource.department) || resource.owner == principal };
@id("old-tls") forbid (principal, action == Action::"desk.read", resource)
  when { context.tls_version != "1.3" && !context.client_certificate };
@id("weekend") forbid (principal, action == Action::"desk.read", resource) when { context.weekday > 5 };
@id("open") permit (principal in Role::"reader", action == Action::"open", resource) unless { context.hour < 6 };
"#;

#[test]
fn a_table_says_what_cedar_says_in_every_case() {
    let mut cells = 0;
    for (action, kind) in [("room.read", "Room"), ("desk.read", "Desk"), ("open", "Route")] {
        let decision = decision(TABULATED, action, kind);
        let table =
            decision.judge.table.as_ref().unwrap_or_else(|| panic!("{action}: {:?}", decision.obstacle()));
        let resource = match kind {
            "Desk" => found("r", "d", "o"),
            _ => Found { id: "r".into(), department: None, owner: None },
        };
        let mut allowed = 0;
        for (example, says) in table.examples(&resource) {
            let sample = example.sample();
            let evaluated = decision.evaluate(&sample);
            assert_eq!((says, table.allows(&sample)), (evaluated.allowed, evaluated.allowed), "{sample:?}");
            cells += 1;
            allowed += usize::from(says);
        }
        assert!(allowed > 0, "{action}");
    }
    assert!(cells > 500, "{cells}");
}

#[test]
fn what_is_used_in_any_other_way_is_evaluated() {
    for (condition, why) in [
        ("principal has acr && principal.acr like \"mfa*\"", "uses principal.acr"),
        ("principal == User::\"alice\"", "compares the principal itself"),
        ("principal.issuer == \"x\"", "uses principal.issuer"),
        ("principal.amr.isEmpty()", "uses principal.amr"),
        ("principal has login_age && principal.login_age + 1 < 300", "uses principal.login_age"),
        ("context.address.isLoopback()", "uses context.address"),
        ("context has token_age && context.token_age < 60", "uses context.token_age"),
        ("context.now > datetime(\"2026-01-01\")", "uses context.now"),
        ("resource == Room::\"mine\"", "compares the resource itself"),
        (
            "{ \"Value\": principal.acr == \"x\" && principal.issuer == \"y\" }.Value && principal has acr",
            "uses principal.issuer",
        ),
    ] {
        let policies = format!(
            "@id(\"p\") permit (principal, action == Action::\"room.read\", resource) when {{ {condition} }};"
        );
        let policies = match condition.starts_with('{') {
            // A record whose one attribute has the name of an operator hides nothing.
            true => policies.replace("when {", "when { principal has acr &&"),
            false => policies,
        };
        let decision = decision(&policies, "room.read", "Room");
        assert_eq!((decision.is_tabulated(), decision.obstacle()), (false, Some(why)), "{condition}");
    }
}

#[test]
fn the_tables_of_the_shipped_bundles_say_what_cedar_says() {
    let state = [("state".to_owned(), "/s".to_owned())].into();
    for name in ["enterprise", "regulated", "consumer"] {
        let policy =
            Policy::compile(&Bundle::shipped(name).unwrap(), &state).unwrap_or_else(|it| panic!("{it}"));
        let (mut decisions, mut cells) = (0, 0);
        let of_messages = |rule: &crate::rule::Rule| {
            let tables = rule.tunnel.iter().flat_map(|it| [&it.to_upstream, &it.to_client]).flatten();
            tables.flat_map(|it| it.types.values()).filter(|it| it.authorization.is_some()).count()
        };
        for rule in policy.rules() {
            decisions += of_messages(rule);
            let Some(decision) = &rule.authorization else { continue };
            let table = decision.judge.table.as_ref().unwrap_or_else(|| panic!("{}: no table", rule.name));
            let resource = Found {
                id: "r".into(),
                department: decision.resource.department.as_ref().map(|_| Cow::Borrowed("d")),
                owner: decision.resource.owner.as_ref().map(|_| Cow::Borrowed("o")),
            };
            for (example, says) in table.examples(&resource) {
                assert_eq!(says, decision.evaluate(&example.sample()).allowed, "{}: {example:?}", rule.name);
                cells += 1;
            }
            decisions += 1;
            assert!(decision.is_privileged(), "{name}: {} is for anybody", rule.name);
        }
        assert!(decisions >= 8 && cells >= 8, "{name}: {decisions} decisions, {cells} cells");
    }
}

fn somebody() -> impl Strategy<Value = IdentityParts> {
    let one_of = |known: &'static [&'static str]| prop_oneof![4 => prop::sample::select(known).prop_map(str::to_owned), 1 => "[a-z]{0,6}"];
    let roles = prop::collection::vec(one_of(&["reader", "banned", "leaver", "careless", "Reader"]), 0..4);
    let amr = prop::collection::vec(one_of(&["otp", "hwk", "swk", "pwd", "OTP"]), 0..4);
    let acr = prop::option::of(one_of(&["high", "mfa", "low", "MFA"]));
    let age = prop::option::of(prop_oneof![0_u64..2_000_000, 298_u64..302, 3_598_u64..3_602]);
    let name = one_of(&["alice", "bob"]);
    let department = prop::option::of(one_of(&["sales", "legal"]));
    (roles, amr, acr, age, name, department).prop_map(|(roles, amr, acr, age, subject, department)| {
        IdentityParts {
            subject,
            roles,
            amr,
            acr,
            department,
            auth_time: age.map(|age| NOW - age),
            ..IdentityParts::default()
        }
    })
}

const NOW: u64 = 1_800_000_000;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_table_says_what_cedar_says_of_anybody(
        who in somebody(),
        department in prop::sample::select(vec!["sales", "legal", "x"]),
        owner in prop::sample::select(vec!["alice", "bob", "x"]),
        tls13: bool,
        client_certificate: bool,
        later in 0_u64..700_000,
    ) {
        thread_local! {
            static DECISIONS: [Decision; 2] = {
                [decision(TABULATED, "room.read", "Room"), decision(TABULATED, "desk.read", "Desk")]
            };
        }
        let identity = Arc::new(Identity::new(who));
        let tls = TlsFacts { tls13, client_certificate };
        let address = IpAddr::from([192, 0, 2, 1]);
        DECISIONS.with(|[room, desk]| {
            for (decision, found) in [
                (room, Found { id: "r".into(), department: None, owner: None }),
                (desk, found("r", department, owner)),
            ] {
                let sample = Sample::of(&identity, address, tls, NOW + later, &found);
                let evaluated = decision.evaluate(&sample);
                assert_eq!(decision.look_up(&sample), Some(evaluated.allowed), "{sample:?}: {evaluated:?}");
            }
        });
    }
}

#[test]
fn deny_wins() {
    let policies = r#"
@id("all") permit (principal, action == Action::"room.read", resource);
@id("not-bob") forbid (principal == User::"bob", action, resource);
@id("address") forbid (principal, action, resource) when { context.address.isInRange(ip("203.0.113.0/24")) };
"#;
    let decision = decision(policies, "room.read", "Room");
    assert!(!decision.is_tabulated() && !decision.needs_time() && decision.is_privileged());
    let found = Found { id: "r".into(), department: None, owner: None };
    let address = IpAddr::from([192, 0, 2, 1]);
    let ask = |subject: &str, roles: &[&str], address: IpAddr, now: u64| {
        let roles = roles.iter().map(|role| (*role).to_owned()).collect();
        let identity =
            Identity::new(IdentityParts { subject: subject.into(), roles, ..IdentityParts::default() });
        decision.evaluate(&Sample::of(&identity, address, TlsFacts::default(), now, &found))
    };
    let alice = ask("alice", &[], address, 0);
    assert_eq!((alice.allowed, alice.policies), (true, vec!["all".to_owned()]));
    let bob = ask("bob", &[], address, 0);
    assert_eq!((bob.allowed, bob.policies), (false, vec!["not-bob".to_owned()]));
    assert!(!ask("alice", &[], IpAddr::from([203, 0, 113, 9]), 0).allowed);
}

#[test]
fn a_policy_that_errs_denies_even_where_another_permits() {
    let policies = r#"
@id("all") permit (principal, action == Action::"room.read", resource);
@id("overflows") forbid (principal in Role::"careless", action == Action::"room.read", resource)
  when { 9223372036854775807 + context.hour > 0 && context.client_certificate };
"#;
    let decision = decision(policies, "room.read", "Room");
    let found = Found { id: "r".into(), department: None, owner: None };
    let ask = |roles: &[&str], now: u64| {
        let roles = roles.iter().map(|role| (*role).to_owned()).collect();
        let identity =
            Identity::new(IdentityParts { subject: "alice".into(), roles, ..IdentityParts::default() });
        let sample = Sample::of(&identity, IpAddr::from([192, 0, 2, 1]), TlsFacts::default(), now, &found);
        (decision.evaluate(&sample), decision.look_up(&sample))
    };
    let (fine, table) = ask(&["careless"], 0);
    assert_eq!((fine.allowed, table), (true, Some(true)), "{fine:?}");
    let (erred, table) = ask(&["careless"], 3_600);
    assert_eq!((erred.allowed, erred.errors.len(), table), (false, 1, Some(false)), "{erred:?}");
    assert!(ask(&[], 3_600).0.allowed);
}

#[test]
fn answers_are_remembered_for_the_same_question_only() {
    let policies = r#"
@id("room") permit (principal, action == Action::"room.read", resource)
  when { resource == Room::"open" || context.address.isInRange(ip("192.0.2.0/24")) };
"#;
    let decision = decision(policies, "room.read", "Room");
    assert!(!decision.is_tabulated() && !decision.needs_time());
    let cache = DecisionCache::new(16);
    let identity =
        Arc::new(Identity::new(IdentityParts { subject: "alice".into(), ..IdentityParts::default() }));
    let other = Arc::new(Identity::clone(&identity));
    let asked = std::cell::Cell::new(0);
    let ask = |identity: &Arc<Identity>, serial: u64, id: &'static str, address: [u8; 4], now: u64| {
        let found = Found { id: id.into(), department: None, owner: None };
        let sample = Sample::of(identity, address.into(), TlsFacts::default(), now, &found);
        let touched = &decision.judge.inspection.touched;
        cache.decide(serial, identity, touched, &sample, || {
            asked.set(asked.get() + 1);
            decision.evaluate(&sample).allowed
        })
    };
    let (near, far) = ([192, 0, 2, 7], [203, 0, 113, 7]);
    for _ in 0..3 {
        assert!(ask(&identity, 1, "open", far, 1) && ask(&identity, 1, "closed", near, 2));
        assert!(!ask(&identity, 1, "closed", far, 3));
    }
    assert_eq!(asked.get(), 3, "the time is nothing that the policy looks at");
    ask(&other, 1, "open", far, 1);
    ask(&identity, 2, "open", far, 1);
    assert_eq!(asked.get(), 5, "another token, another policy");
    // Bounded, and still right when it overflows.
    for number in 0..200_u32 {
        let id: &'static str = if number % 2 == 0 { "open" } else { "closed" };
        let address = (number | 0x0b00_0000).to_be_bytes();
        assert_eq!(ask(&identity, 1, id, address, 1), id == "open");
    }
}

#[test]
fn dates_as_cedar_reads_them() {
    for (seconds, text) in [
        (0, "1970-01-01T00:00:00Z"),
        (951_782_400, "2000-02-29T00:00:00Z"),
        (1_709_251_199, "2024-02-29T23:59:59Z"),
        (1_767_268_800, "2026-01-01T12:00:00Z"),
        (4_102_444_800, "2100-01-01T00:00:00Z"),
    ] {
        assert_eq!(rfc3339(seconds), text);
    }
    let found = Found { id: "r".into(), department: None, owner: None };
    let identity = Identity::new(IdentityParts::default());
    let at = |now| {
        let sample = Sample::of(&identity, IpAddr::from([0; 4]), TlsFacts::default(), now, &found);
        (sample.weekday(), sample.hour())
    };
    assert_eq!(at(1_767_268_800), (4, 12), "a Thursday");
    assert_eq!((at(1_767_268_800 + 3 * 86_400).0, at(1_767_268_800 + 4 * 86_400).0), (7, 1));
}

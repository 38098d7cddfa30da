//! `sealgate policy …`: what needs no running gateway.

use std::{fs, net::IpAddr, path::PathBuf};

use anyhow::{Context as _, anyhow, ensure};
use clap::{Args, Subcommand};
use sealgate_policy::{Authorization, Bundle, Explanation, Policy, Question};
use serde_json::{Map, Value, json};

use super::{FINE, PolicyArgs, REFUSED};
use crate::reload::PolicySource;

#[derive(Subcommand)]
pub enum PolicyCommand {
    /// Run the verdicts in the bundle's `tests/`. Exit code 0 or 1.
    Test(TestArgs),
    /// Say what the policy makes of a request or message, and which rule or Cedar policy decided. Exit code 0 if it is
    /// allowed, 1 if not.
    Explain(Box<ExplainArgs>),
    /// Print the JSON Schema of `policy.toml`, for editors.
    Schema,
}

#[derive(Args)]
pub struct TestArgs {
    #[command(flatten)]
    policy: PolicyArgs,
}

#[derive(Args)]
pub struct ExplainArgs {
    #[command(flatten)]
    policy: PolicyArgs,
    /// Answer as JSON.
    #[arg(long)]
    json: bool,
    /// Take the questions from a file of verdicts, such as tests/access.toml of the bundle.
    #[arg(long, value_name = "FILE", conflicts_with = "path")]
    test: Option<PathBuf>,
    /// Only the verdict of this name.
    #[arg(long, value_name = "NAME", requires = "test")]
    name: Option<String>,
    /// Path of the request.
    #[arg(value_name = "PATH", required_unless_present = "test")]
    path: Option<String>,
    /// Method; by default GET, or POST with a body.
    #[arg(long, value_name = "METHOD")]
    method: Option<String>,
    /// Query, without `?`.
    #[arg(long, value_name = "QUERY")]
    query: Option<String>,
    /// Host; by default localhost.
    #[arg(long, value_name = "HOST")]
    host: Option<String>,
    /// The client's address; by default 192.0.2.1.
    #[arg(long, value_name = "ADDRESS")]
    peer: Option<IpAddr>,
    /// Origin of a page.
    #[arg(long, value_name = "ORIGIN")]
    origin: Option<String>,
    /// WebSocket subprotocols offered.
    #[arg(long, value_name = "LIST")]
    subprotocol: Option<String>,
    /// Body of the request.
    #[arg(long, value_name = "TEXT")]
    body: Option<String>,
    /// Text message that the client sends in the WebSocket at PATH.
    #[arg(long, value_name = "TEXT", conflicts_with = "body")]
    message: Option<String>,
    /// Version of TLS: 1.2 or 1.3, the default.
    #[arg(long, value_name = "VERSION")]
    tls: Option<String>,
    /// The connection has a verified client certificate.
    #[arg(long)]
    client_certificate: bool,
    /// Who asks; without it nobody is known.
    #[arg(long, value_name = "SUBJECT")]
    subject: Option<String>,
    /// A role of the subject. May be repeated.
    #[arg(long = "role", value_name = "ROLE", requires = "subject")]
    roles: Vec<String>,
    /// The subject's department.
    #[arg(long, value_name = "DEPARTMENT", requires = "subject")]
    department: Option<String>,
    /// Authentication context class of the login.
    #[arg(long, value_name = "ACR", requires = "subject")]
    acr: Option<String>,
    /// A method of the login. May be repeated.
    #[arg(long = "amr", value_name = "METHOD", requires = "subject")]
    amr: Vec<String>,
    /// Seconds since the login.
    #[arg(long, value_name = "SECONDS", requires = "subject")]
    login_age: Option<u64>,
    /// Seconds since the token was issued.
    #[arg(long, value_name = "SECONDS", requires = "subject")]
    token_age: Option<u64>,
}

pub fn policy(command: PolicyCommand) -> anyhow::Result<u8> {
    match command {
        PolicyCommand::Test(args) => test(&args),
        PolicyCommand::Explain(args) => explain(&args),
        PolicyCommand::Schema => schema(),
    }
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
fn schema() -> anyhow::Result<u8> {
    println!("{}", serde_json::to_string_pretty(&sealgate_policy::json_schema())?);
    Ok(FINE)
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
fn test(args: &TestArgs) -> anyhow::Result<u8> {
    let (bundle, policy) = compiled(&args.policy)?;
    let outcomes = sealgate_policy::run_tests(&policy, &bundle);
    let mut failed = 0;
    for outcome in &outcomes {
        match &outcome.failure {
            None => println!("ok      {}", outcome.name),
            Some(why) => {
                failed += 1;
                println!("FAILED  {}: {why}", outcome.name);
            }
        }
    }
    println!("{} passed, {failed} failed", outcomes.len() - failed);
    Ok(if failed == 0 { FINE } else { REFUSED })
}

fn compiled(args: &PolicyArgs) -> anyhow::Result<(Bundle, Policy)> {
    let source = PolicySource::from(args);
    let bundle = Bundle::read(&source.bundle)?;
    let policy = Policy::compile(&bundle, &source.variables)?;
    Ok((bundle, policy))
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
fn explain(args: &ExplainArgs) -> anyhow::Result<u8> {
    let (_, policy) = compiled(&args.policy)?;
    let questions = match &args.test {
        Some(file) => {
            let text = fs::read(file).with_context(|| file.display().to_string())?;
            let mut questions =
                Question::of_tests(&text).map_err(|error| anyhow!("{}: {error}", file.display()))?;
            if let Some(name) = &args.name {
                questions.retain(|question| question.name() == Some(name));
                ensure!(!questions.is_empty(), "{}: no verdict is called `{name}`", file.display());
            }
            questions
        }
        None => vec![args.question().map_err(|error| anyhow!("{error}"))?],
    };
    let mut allowed = true;
    for question in &questions {
        let answer = sealgate_policy::explain(&policy, question).map_err(|error| anyhow!("{error}"))?;
        allowed &= answer.allowed;
        if args.json {
            println!("{}", json!({ "name": question.name(), "answer": answer }));
        } else {
            if let Some(name) = question.name() {
                println!("{name}:");
            }
            print_answer(&answer);
        }
    }
    Ok(if allowed { FINE } else { REFUSED })
}

impl ExplainArgs {
    /// The command line in the words of a verdict.
    fn question(&self) -> Result<Question, String> {
        fn object(pairs: Vec<(&str, Option<Value>)>) -> Map<String, Value> {
            let given = pairs.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
            given.collect()
        }
        let text = |value: &Option<String>| value.clone().map(Value::String);
        let request = object(vec![
            ("path", text(&self.path)),
            ("method", text(&self.method)),
            ("query", text(&self.query)),
            ("host", text(&self.host)),
            ("peer", self.peer.map(|peer| json!(peer))),
            ("origin", text(&self.origin)),
            ("subprotocol", text(&self.subprotocol)),
            ("body", text(&self.body)),
            ("tls", text(&self.tls)),
            ("client_certificate", Some(self.client_certificate.into())),
        ]);
        let identity = self.subject.is_some().then(|| {
            Value::Object(object(vec![
                ("subject", text(&self.subject)),
                ("roles", Some(json!(self.roles))),
                ("department", text(&self.department)),
                ("acr", text(&self.acr)),
                ("amr", Some(json!(self.amr))),
                ("auth_age", self.login_age.map(Value::from)),
                ("token_age", self.token_age.map(Value::from)),
            ]))
        });
        let message = self.message.as_ref().map(|message| json!({ "text": message }));
        Question::new(Value::Object(object(vec![
            ("request", Some(Value::Object(request))),
            ("identity", identity),
            ("message", message),
        ])))
    }
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
fn print_answer(answer: &Explanation) {
    let (verdict, reason) = match answer.reason {
        None => ("allowed", String::new()),
        Some(reason) => {
            let code = |code: Option<u16>| code.map(|code| code.to_string()).unwrap_or_default();
            ("refused", format!(": {reason} (status {}, close {})", code(answer.status), code(answer.close)))
        }
    };
    println!("{verdict}{reason}");
    println!("  decided by  {}", answer.decided_by);
    if let Some(rule) = &answer.rule {
        println!("  rule        {rule}");
    }
    if let Some(detail) = &answer.detail {
        println!("  told        {detail}");
    }
    if let Some(shadowed) = answer.shadowed {
        println!("  shadow mode lets it pass, and notes {shadowed}");
    }
    if let Some(what) = &answer.authorization {
        print_authorization(what);
    }
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
fn print_authorization(what: &Authorization) {
    println!("  action      {}", what.action);
    let resource = what.resource.as_deref().map_or("not found".to_owned(), |id| format!("{id:?}"));
    let more = [("department", &what.department), ("owner", &what.owner)];
    let more: String =
        more.iter().filter_map(|(key, value)| Some(format!(", {key} {:?}", value.as_deref()?))).collect();
    println!("  resource    {} {resource}{more}", what.resource_type);
    for policy in &what.policies {
        let reason = policy.reason.as_deref().map(|reason| format!(": {reason}")).unwrap_or_default();
        println!("  {:<11} {} ({}:{}){reason}", policy.effect, policy.id, policy.file, policy.line);
    }
    for error in &what.errors {
        println!("  error       {error}");
    }
    let facts = what.facts.join(", ");
    match &what.evaluated_because {
        None => println!("  looked up by {facts}"),
        Some(why) => println!("  evaluated by {facts}, as a policy {why}"),
    }
}

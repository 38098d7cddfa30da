//! What is wrong with a bundle: every error, with the place the operator typed it.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Longest source line shown; a longer one is cut.
const MAX_LINE: usize = 160;

/// One error in a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyError {
    /// File within the bundle.
    pub file: String,
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
    /// The key as the operator typed it, such as `route.login.rates[0]`; empty for a whole file.
    pub key: String,
    /// What is wrong and what was expected.
    pub message: String,
    /// The line.
    pub source_line: String,
}

/// All errors of a bundle, in the order of files, lines and columns. Never empty when returned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PolicyErrors(pub Vec<PolicyError>);

impl PolicyError {
    /// Finds line and column of a byte offset in `text`.
    pub(crate) fn at(file: &str, text: &str, offset: usize, key: String, message: String) -> Self {
        let before = text.get(..offset).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let line = before.matches('\n').count() + 1;
        let column = before.get(line_start..).map_or(0, |start| start.chars().count()) + 1;
        let source_line = text.get(line_start..).and_then(|rest| rest.lines().next()).unwrap_or_default();
        Self {
            file: file.to_owned(),
            line: u32::try_from(line).unwrap_or(u32::MAX),
            column: u32::try_from(column).unwrap_or(u32::MAX),
            key,
            message,
            source_line: source_line.chars().take(MAX_LINE).collect(),
        }
    }
}

/// `file:line:column: key: message`, then the line and a caret.
impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, column, key, message, source_line } = self;
        write!(f, "{file}:{line}:{column}: ")?;
        if !key.is_empty() {
            write!(f, "{key}: ")?;
        }
        write!(f, "{message}")?;
        if source_line.is_empty() {
            return Ok(());
        }
        let number = line.to_string();
        let margin = " ".repeat(number.len());
        // Tabs stay tabs, so that the caret stands under its character.
        let indent: String = source_line
            .chars()
            .take(usize::try_from(*column).unwrap_or(1).saturating_sub(1))
            .map(|c| if c == '\t' { '\t' } else { ' ' })
            .collect();
        write!(f, "\n{margin} |\n{number} | {source_line}\n{margin} | {indent}^")
    }
}

impl fmt::Display for PolicyErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for PolicyError {}
impl std::error::Error for PolicyErrors {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_the_line_with_a_caret() {
        let error = PolicyError::at("policy.toml", "a = 1\n\tü = x\n", 12, "ü".into(), "bad".into());
        assert_eq!((error.line, error.column), (2, 6));
        assert_eq!(error.to_string(), "policy.toml:2:6: ü: bad\n  |\n2 | \tü = x\n  | \t    ^");
        let end = PolicyError::at("f", "x", 99, String::new(), "m".into());
        assert_eq!((end.line, end.column, end.source_line.as_str()), (1, 2, "x"));
    }
}

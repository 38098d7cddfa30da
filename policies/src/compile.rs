use crate::bundle::Bundle;
use crate::errors::PolicyErrors;
use crate::policy::Policy;
use std::collections::BTreeMap;
impl Policy {
    /// Compiles.
    pub fn compile(_bundle: &Bundle, _variables: &BTreeMap<String, String>) -> Result<Policy, PolicyErrors> {
        Err(PolicyErrors(Vec::new()))
    }
}

//! Policy: what is allowed, and why not.

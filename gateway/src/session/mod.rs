//! Whose token it is, and whether it still counts.
//!
//! A token's way: [`bearer`] finds it in the request, in the one place where it may stand; the snapshot's [`Verifier`]
//! turns it into an `Identity`, by way of the core's [`TokenCache`]; if it is bound to a key, [`Proofs`] checks that the
//! sender holds it; [`Tickets`] stand for a token where a browser cannot send one; [`Sessions`] keeps its session's
//! clock; [`Revocations`] may know better, the [`Journal`]
//! keeps them over a restart, and the [`Registry`] finds the open sockets of a session that ends.

mod bearer;
mod cache;
mod clock;
mod dpop;
mod journal;
mod json;
mod jwks;
mod listing;
mod logout;
mod record;
mod registry;
mod revocation;
mod sealed;
mod tickets;
mod token;
mod verifier;

#[cfg(test)]
mod minting;

pub use bearer::{SUBPROTOCOL_PREFIX, Scheme, Token, bearer};
pub use cache::TokenCache;
pub use clock::{Begun, Look, Session, SessionEnd, Sessions};
pub use dpop::{Accepted, Asked, DPOP, Proofs, proof};
pub use journal::{Journal, JournalError, Kept, Mark, Place, read_journal};
pub use jwks::{JwksError, KeyFetcher};
pub use listing::{Listing, MAX_PAGE, Rows, SessionKey, SessionPage, SessionQuery, SessionRow};
pub use logout::{LogoutToken, LogoutTokens, logout_token};
pub(crate) use record::{MAX_TTL, Record};
pub use record::{OwnedRevocation, decode, encode};
pub use registry::{Registration, Registry, RegistryFull};
pub use revocation::{OwnedTarget, Revocation, Revocations, RevocationsFull, Target};
pub use sealed::{Content, open as open_sealed, seal};
pub use tickets::{TICKET_PREFIX, Ticket, TicketText, Tickets, fits, origin, ticket, ticket_name};
pub use verifier::{KeySourceError, LogoutFailure, TokenFailure, Verifier};

//! Tickets for WebSockets that any gateway may redeem, once: sealed, under the hash of their text, for as long as they count.

use std::sync::Arc;
use std::time::Duration;

use redis::{Value, cmd};

use super::servers::{Connection, Fault};
use super::{Shared, Together};

/// The way to tickets in Redis.
pub(super) struct TicketBoard {
    pub(super) connection: Connection,
    pub(super) prefix: Arc<str>,
}

impl TicketBoard {
    fn key(&self, name: &str) -> String {
        format!("{}:ticket:{name}", self.prefix)
    }
}

impl Shared {
    /// Lets other gateways redeem a ticket within `ttl`. Waits for one round trip, for the policy's deadline at most.
    pub async fn offer_ticket(&self, name: &str, sealed: &[u8], ttl: Duration) -> Together<()> {
        let ttl = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1);
        self.in_time(
            |link| link.tickets.key(name),
            async |link| {
                let mut command = cmd("SET");
                command.arg(link.tickets.key(name)).arg(sealed).arg("NX").arg("PX").arg(ttl);
                match link.tickets.connection.ask(&command, link.deadline).await? {
                    Value::Okay => Ok(()),
                    _ => Err(Fault::Answer("SET")),
                }
            },
        )
        .await
    }

    /// Takes a ticket from all gateways: of many that ask, one gets it. Waits as [`offer_ticket`](Self::offer_ticket).
    pub async fn take_ticket(&self, name: &str) -> Together<Option<Vec<u8>>> {
        self.in_time(
            |link| link.tickets.key(name),
            async |link| {
                let mut command = cmd("GETDEL");
                command.arg(link.tickets.key(name));
                match link.tickets.connection.ask(&command, link.deadline).await? {
                    Value::Nil => Ok(None),
                    Value::BulkString(sealed) => Ok(Some(sealed)),
                    _ => Err(Fault::Answer("GETDEL")),
                }
            },
        )
        .await
    }
}

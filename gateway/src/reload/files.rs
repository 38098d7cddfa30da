//! Notices that a policy's files changed.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};
use tokio::sync::{mpsc, oneshot};

use super::{Cause, Request, Snapshot};

/// Quiet time after the last event before files are read: an editor writes in several steps.
const DEBOUNCE: Duration = Duration::from_millis(100);

/// Longest wait for that quiet.
const MAX_DEBOUNCE: Duration = Duration::from_secs(2);

/// Asks for a reload after files of the bundle, or certificates that it names, changed. Ends with the
/// receiver of `requests`.
///
/// Folders are watched, not files: editors rename over a file, and Kubernetes swaps a symbolic link
/// beside it. The folder that holds the bundle is watched too, since the bundle may be such a link; and
/// all watches are renewed after each change, because they follow the old folder and not the name.
pub async fn watch_files(bundle: PathBuf, current: Arc<ArcSwap<Snapshot>>, requests: mpsc::Sender<Request>) {
    let (events, mut changed) = mpsc::channel(1);
    let mut watched = folders(&bundle, &current.load().files);
    let mut _watcher = watcher(&bundle, &watched, events.clone());
    while changed.recv().await.is_some() {
        settle(&mut changed).await;
        // Renewed before the files are read: what changes after this is a new event, what changed
        // before it is read now.
        _watcher = watcher(&bundle, &watched, events.clone());
        let (reply, outcome) = oneshot::channel();
        if requests.send(Request { cause: Cause::FileChange, reply: Some(reply) }).await.is_err() {
            return;
        }
        // The reloader has logged the outcome.
        let _ = outcome.await;
        let wanted = folders(&bundle, &current.load().files);
        if wanted != watched {
            watched = wanted;
            _watcher = watcher(&bundle, &watched, events.clone());
            // A file in a new folder may have changed since it was read.
            let _ = events.try_send(());
        }
    }
}

async fn settle(changed: &mut mpsc::Receiver<()>) {
    let latest = tokio::time::Instant::now() + MAX_DEBOUNCE;
    while tokio::time::Instant::now() < latest {
        match tokio::time::timeout(DEBOUNCE, changed.recv()).await {
            Ok(Some(())) => {}
            Ok(None) | Err(_) => return,
        }
    }
}

fn folders(bundle: &Path, files: &[PathBuf]) -> BTreeSet<PathBuf> {
    let mut folders: BTreeSet<_> =
        files.iter().filter_map(|file| file.parent()).map(Path::to_owned).collect();
    folders.insert(bundle.to_owned());
    folders.extend(["policy.d", "schemas", "tests"].map(|inner| bundle.join(inner)));
    folders.retain(|folder| folder.is_dir());
    folders
}

/// Watches `folders`, and the one around the bundle for the bundle's own name. Dropped, it ends.
fn watcher(
    bundle: &Path,
    folders: &BTreeSet<PathBuf>,
    events: mpsc::Sender<()>,
) -> Option<RecommendedWatcher> {
    let around = bundle.parent().filter(|around| !folders.contains(*around));
    let (own_name, inner) = (bundle.to_owned(), folders.clone());
    let concerns_us =
        move |path: &PathBuf| *path == own_name || path.parent().is_some_and(|p| inner.contains(p));
    let start = || {
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading is no change. An error (an overflow, say) may hide one.
            let relevant = event.as_ref().map_or(true, |event| {
                !event.kind.is_access() && (event.paths.is_empty() || event.paths.iter().any(&concerns_us))
            });
            if relevant {
                // Full means that a change is known already.
                let _ = events.try_send(());
            }
        })?;
        for folder in folders.iter().map(PathBuf::as_path).chain(around) {
            watcher.watch(folder, RecursiveMode::NonRecursive)?;
        }
        Ok::<_, notify::Error>(watcher)
    };
    start()
        .inspect_err(|error| {
            tracing::error!(%error, "files cannot be watched; reload by SIGHUP or `sealgate reload`");
        })
        .ok()
}

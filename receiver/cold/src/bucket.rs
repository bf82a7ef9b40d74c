//! Where objects are: S3 or a local directory, below a prefix.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    BackoffConfig, ClientOptions, Error, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, RetryConfig,
};
use url::Url;

use crate::ColdError;

/// Tries of a request after the first.
const RETRIES_MAX: usize = 8;
/// From a request's first try on, no further one is begun after this.
const RETRY_TIME_MAX: Duration = Duration::from_secs(180);
/// Between two tries, at most.
const BACKOFF_MAX: Duration = Duration::from_secs(20);
/// The longest that one request may take: four chunks at once over 100 kbit/s.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(360);
/// The longest that a connection may take.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(15);

/// Which storage.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Location {
    /// `s3://BUCKET/PREFIX` or `file:///DIRECTORY`.
    pub url: String,
    /// Of an S3 service that is not AWS: `https://HOST:PORT`.
    pub endpoint: Option<String>,
    /// Of S3.
    pub region: Option<String>,
    /// Of S3: the credentials, instead of those in the environment (`AWS_ACCESS_KEY_ID` and so on) or of the machine.
    pub credentials: Option<(String, String)>,
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { url, endpoint, region, credentials } = self;
        let [url, endpoint] = [Some(url), endpoint.as_ref()].map(|url| url.map(|url| without_user(url)));
        let credentials = credentials.as_ref().map(|_| "..");
        let mut shown = f.debug_struct("Location");
        shown.field("url", &url).field("endpoint", &endpoint).field("region", region);
        shown.field("credentials", &credentials).finish()
    }
}

/// A URL for messages: whoever puts a password there does not find it in a log.
fn without_user(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return url.to_owned() };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    match authority.rsplit_once('@') {
        Some((user, _)) => format!("{scheme}://..{}", &rest[user.len()..]),
        None => url.to_owned(),
    }
}

/// A place for objects. Cloned, it is the same one.
#[derive(Debug, Clone)]
pub struct Bucket {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    shown: String,
}

impl Bucket {
    /// Opens it. Nothing is asked of a service yet. A local directory has to be there: made where something was to be mounted, it
    /// would take what nobody looks for there.
    pub fn open(location: &Location) -> Result<Self, ColdError> {
        let wrong = |what: String| ColdError::Location { url: without_user(&location.url), what };
        let url = Url::parse(&location.url)
            .map_err(|e| wrong(format!("{e}; write s3://BUCKET/PREFIX or file:///DIRECTORY")))?;
        if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
            return Err(wrong("write s3://BUCKET/PREFIX or file:///DIRECTORY and nothing else".to_owned()));
        }
        let shown = location.url.trim_end_matches('/').to_owned();
        match url.scheme() {
            "file" => {
                let directory: PathBuf =
                    url.to_file_path().map_err(|()| wrong("write file:///DIRECTORY, an absolute path".to_owned()))?;
                if !directory.is_dir() {
                    return Err(wrong("the directory is not there: make it, or mount what has it".to_owned()));
                }
                // Else a point would be offered before its chunks are on the disk.
                let store = LocalFileSystem::new_with_prefix(&directory).map_err(|e| wrong(e.to_string()))?;
                Ok(Self { store: Arc::new(store.with_fsync(true)), prefix: Path::default(), shown })
            }
            "s3" => {
                let bucket = url.host_str().ok_or_else(|| wrong("the bucket is missing".to_owned()))?;
                // Another library may have chosen already; any will do.
                let _ = rustls::crypto::ring::default_provider().install_default();
                if location.endpoint.as_ref().is_some_and(|endpoint| without_user(endpoint) != *endpoint) {
                    let what = "its endpoint has a user in it: credentials come from the environment";
                    return Err(wrong(what.to_owned()));
                }
                let plain = location.endpoint.as_ref().is_some_and(|endpoint| endpoint.starts_with("http://"));
                let client = ClientOptions::new()
                    .with_allow_http(plain)
                    .with_timeout(REQUEST_TIME_MAX)
                    .with_connect_timeout(CONNECT_TIME_MAX);
                let backoff = BackoffConfig { max_backoff: BACKOFF_MAX, ..BackoffConfig::default() };
                let retry = RetryConfig { backoff, max_retries: RETRIES_MAX, retry_timeout: RETRY_TIME_MAX };
                let mut builder =
                    AmazonS3Builder::from_env().with_bucket_name(bucket).with_client_options(client).with_retry(retry);
                if let Some(endpoint) = &location.endpoint {
                    builder = builder.with_endpoint(endpoint);
                }
                if let Some(region) = &location.region {
                    builder = builder.with_region(region);
                }
                if let Some((id, secret)) = &location.credentials {
                    builder = builder.with_access_key_id(id).with_secret_access_key(secret);
                }
                let store = builder.build().map_err(|e| wrong(e.to_string()))?;
                let prefix = Path::from_url_path(url.path()).map_err(|e| wrong(e.to_string()))?;
                Ok(Self { store: Arc::new(store), prefix, shown })
            }
            other => Err(wrong(format!("{other}:// is not supported; s3:// and file:/// are"))),
        }
    }

    /// The URL, for messages.
    pub fn shown(&self) -> &str {
        &self.shown
    }

    pub(crate) fn path(&self, name: &str) -> Path {
        let below = name.split('/').filter(|part| !part.is_empty()).map(object_store::path::PathPart::from);
        self.prefix.parts().chain(below).collect()
    }

    /// An object's content, if it is there.
    pub(crate) async fn get(&self, name: &str, bytes_max: u64) -> Result<Option<Bytes>, ColdError> {
        let failed = |source| ColdError::Store { doing: "read", object: name.to_owned(), source };
        let found = match self.store.get(&self.path(name)).await {
            Ok(found) => found,
            Err(Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        if found.meta.size > bytes_max {
            let what = format!("it has {} bytes, at most {bytes_max} are possible", found.meta.size);
            return Err(ColdError::Damaged { object: name.to_owned(), what });
        }
        found.bytes().await.map(Some).map_err(failed)
    }

    /// The first bytes of an object, if it is there.
    pub(crate) async fn begin(&self, name: &str, bytes: u64) -> Result<Option<Bytes>, ColdError> {
        match self.store.get_range(&self.path(name), 0..bytes).await {
            Ok(found) => Ok(Some(found)),
            Err(Error::NotFound { .. }) => Ok(None),
            // Of an empty object there is no range.
            Err(_) if self.head(name).await?.is_some_and(|meta| meta.size == 0) => Ok(Some(Bytes::new())),
            Err(source) => Err(ColdError::Store { doing: "read", object: name.to_owned(), source }),
        }
    }

    /// What is known of an object without reading it.
    pub(crate) async fn head(&self, name: &str) -> Result<Option<ObjectMeta>, ColdError> {
        match self.store.head(&self.path(name)).await {
            Ok(meta) => Ok(Some(meta)),
            Err(Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(ColdError::Store { doing: "look at", object: name.to_owned(), source }),
        }
    }

    /// Writes an object, in one step; an older one is replaced.
    pub(crate) async fn put(&self, name: &str, content: Bytes) -> Result<(), ColdError> {
        let done = self.store.put(&self.path(name), content.into()).await;
        done.map(|_| ()).map_err(|source| ColdError::Store { doing: "write", object: name.to_owned(), source })
    }

    /// Writes an object that is not there yet; false: it is.
    pub(crate) async fn put_new(&self, name: &str, content: Bytes) -> Result<bool, ColdError> {
        let options = PutOptions::from(PutMode::Create);
        match self.store.put_opts(&self.path(name), content.into(), options).await {
            Ok(_) => Ok(true),
            Err(Error::AlreadyExists { .. } | Error::Precondition { .. }) => Ok(false),
            Err(source) => Err(ColdError::Store { doing: "write", object: name.to_owned(), source }),
        }
    }

    /// Deletes an object; one that is not there is no error.
    pub(crate) async fn delete(&self, name: &str) -> Result<(), ColdError> {
        match self.store.delete(&self.path(name)).await {
            Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(ColdError::Store { doing: "delete", object: name.to_owned(), source }),
        }
    }

    /// Calls `each` for every object below `name`, with its name there.
    pub(crate) async fn list(
        &self,
        name: &str,
        mut each: impl FnMut(&str, &ObjectMeta) -> Result<(), ColdError>,
    ) -> Result<(), ColdError> {
        let failed = |source| ColdError::Store { doing: "list", object: name.to_owned(), source };
        let below = self.path(name);
        let mut found = self.store.list(Some(&below));
        loop {
            let meta = match found.try_next().await {
                Ok(Some(meta)) => meta,
                // A local directory that is not there yet has nothing in it.
                Ok(None) | Err(Error::NotFound { .. }) => return Ok(()),
                Err(error) => return Err(failed(error)),
            };
            if let Some(rest) = meta.location.prefix_match(&below) {
                let rest = rest.map(|part| part.as_ref().to_owned()).collect::<Vec<_>>().join("/");
                each(&rest, &meta)?;
            }
        }
    }

    /// The names directly below the prefix that have something below them.
    pub(crate) async fn directories(&self) -> Result<Vec<String>, ColdError> {
        let prefix = (!self.prefix.as_ref().is_empty()).then_some(&self.prefix);
        let found = match self.store.list_with_delimiter(prefix).await {
            Ok(found) => found,
            Err(Error::NotFound { .. }) => return Ok(Vec::new()),
            Err(source) => {
                return Err(ColdError::Store { doing: "list", object: self.shown.clone(), source });
            }
        };
        Ok(found.common_prefixes.iter().filter_map(|path| path.filename().map(str::to_owned)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_in_no_message() {
        let credentials = Some(("AN-IDENTITY".to_owned(), "A-SECRET".to_owned()));
        let endpoint = Some("https://localhost:1".to_owned());
        let good = Location { url: "s3://bucket/p".to_owned(), endpoint, region: Some("r".to_owned()), credentials };
        let bucket = Bucket::open(&good).unwrap();
        let mut said = vec![format!("{good:?}"), format!("{bucket:?}"), format!("{:#?}", bucket.store)];
        for (url, endpoint) in [
            ("s3://me:A-SECRET@bucket/p", None),
            ("ftp://me:A-SECRET@bucket/p", None),
            ("s3://me:A-SECRET@", None),
            ("s3://bucket/p", Some("https://me:A-SECRET@localhost:1")),
        ] {
            let url = url.to_owned();
            let location = Location { url, endpoint: endpoint.map(str::to_owned), ..Location::default() };
            said.push(format!("{location:?}"));
            said.push(Bucket::open(&location).unwrap_err().to_string());
        }
        for text in said {
            assert!(!text.contains("A-SECRET"), "{text}");
        }
        assert_eq!(without_user("s3://a:b@c@bucket/p@q"), "s3://..@bucket/p@q");
        assert_eq!(without_user("file:///a@b"), "file:///a@b");
    }

    #[test]
    fn what_is_no_storage_is_refused_with_what_to_write() {
        for (url, says) in [
            ("", "s3://BUCKET"),
            ("/mnt/x", "s3://BUCKET"),
            ("gs://bucket", "not supported"),
            ("s3:///x", "bucket"),
            ("file://host/x", "absolute path"),
            ("file:///not/there", "mount"),
            ("s3://bucket/p?x=y", "nothing else"),
        ] {
            let error = Bucket::open(&Location { url: url.to_owned(), ..Location::default() }).unwrap_err().to_string();
            assert!(error.contains(says), "{url}: {error}");
        }
    }
}

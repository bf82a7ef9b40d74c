//! Memory is given back a second after it was needed.
//!
//! An epoch takes up to 100 MiB in thousands of pages, taken by one thread and freed by another. Of that the C library's
//! allocator keeps most for good; jemalloc frees whole runs of pages again, by a thread of its own. What is in use between
//! two batches is 5 to 8 MiB.

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

// SAFETY: the symbol that jemalloc reads its options from: a pointer to a string that ends with a zero byte.
#[allow(unsafe_code, non_upper_case_globals)]
#[unsafe(export_name = "_rjem_malloc_conf")]
static malloc_conf: &[u8; 64] = b"background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0\0\0\0\0\0";

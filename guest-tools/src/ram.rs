//! The RAM area: every page stamped with the number of the write that touched it last.
//!
//! Writes are numbered from 0. A round visits every page once, in an order given by (seed, round); write W is visit
//! `W mod pages` of round `W / pages`. So the one counter W says exactly what every page must hold, and a check finds any page
//! that is older or newer than the counter, whichever way RAM came back.

use crate::aligned::{Aligned, PAGE_BYTES};
use crate::stamp::{self, Area, mix};
use anyhow::{Result, bail};

/// An order of all pages, different in each round: page = (a x visit + b) mod pages, a without a common factor with pages.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    factor: u64,
    offset: u64,
    pages: u64,
}

impl Order {
    /// The order of a round.
    pub fn new(seed: u64, round: u64, pages: u64) -> Self {
        let random = mix(seed ^ mix(round));
        let mut factor = (random % pages) | 1;
        while gcd(factor, pages) != 1 {
            factor += 2;
        }
        Self { factor, offset: mix(random) % pages, pages }
    }

    /// The page of a visit.
    pub fn page(&self, visit: u64) -> u64 {
        let product = u128::from(visit) * u128::from(self.factor) + u128::from(self.offset);
        (product % u128::from(self.pages)) as u64
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The RAM area and the number of writes done to it.
pub struct Ram {
    memory: Aligned,
    pages: u64,
    writes: u64,
    seed: u64,
    fill_bytes: usize,
    order: Order,
}

impl Ram {
    /// An area of `bytes` bytes, every page of which has been stamped once.
    pub fn new(bytes: usize, seed: u64, fill_bytes: usize) -> Result<Self> {
        let pages = (bytes / PAGE_BYTES) as u64;
        if pages == 0 || fill_bytes > stamp::FILL_BYTES_MAX {
            bail!("the RAM area needs a page at least, and at most {} noise bytes a page", stamp::FILL_BYTES_MAX);
        }
        let memory = Aligned::new(bytes);
        let mut ram = Self { memory, pages, writes: 0, seed, fill_bytes, order: Order::new(seed, 0, pages) };
        ram.write(pages);
        Ok(ram)
    }

    /// Stamps the next `count` pages.
    pub fn write(&mut self, count: u64) {
        for _ in 0..count {
            let visit = self.writes % self.pages;
            if visit == 0 {
                self.order = Order::new(self.seed, self.writes / self.pages, self.pages);
            }
            let page = self.order.page(visit);
            let block = self.memory.page_mut(page as usize);
            stamp::write(block, Area::Ram, page, self.writes, self.fill_bytes);
            self.writes += 1;
        }
    }

    /// Writes done since the beginning.
    pub fn writes(&self) -> u64 {
        self.writes
    }

    /// Checks that every page is intact and holds the very write that touched it last.
    pub fn check(&self) -> Result<()> {
        let (round, done) = (self.writes / self.pages, self.writes % self.pages);
        self.check_visits(round, 0..done)?;
        let previous = Order::new(self.seed, round - 1, self.pages);
        let mut visited = vec![false; self.pages as usize];
        let current = Order::new(self.seed, round, self.pages);
        (0..done).for_each(|visit| visited[current.page(visit) as usize] = true);
        for visit in 0..self.pages {
            if !visited[previous.page(visit) as usize] {
                self.check_visits(round - 1, visit..visit + 1)?;
            }
        }
        Ok(())
    }

    fn check_visits(&self, round: u64, visits: std::ops::Range<u64>) -> Result<()> {
        let order = Order::new(self.seed, round, self.pages);
        for visit in visits {
            let page = order.page(visit);
            let expected = round * self.pages + visit;
            if let Err(bad) = stamp::check(self.memory.page(page as usize), Area::Ram, page, expected, self.fill_bytes)
            {
                bail!("RAM page {page} of {} {bad} ({} writes done)", self.pages, self.writes);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_round_visits_every_page_once() {
        for pages in [1, 2, 3, 16, 25, 1000, 4096] {
            for round in 0..5 {
                let order = Order::new(42, round, pages);
                let mut seen: Vec<u64> = (0..pages).map(|visit| order.page(visit)).collect();
                seen.sort_unstable();
                assert!(seen.into_iter().eq(0..pages), "{pages} pages, round {round}");
            }
        }
    }

    #[test]
    fn the_check_passes_after_any_number_of_writes_and_finds_one_stale_page() {
        let mut ram = Ram::new(50 * PAGE_BYTES, 3, 64).unwrap();
        for count in [0, 1, 7, 41, 1, 50, 99] {
            ram.write(count);
            ram.check().unwrap();
        }
        let order = Order::new(3, ram.writes() / 50, 50);
        let next = order.page(ram.writes() % 50) as usize;
        let old = ram.memory.page(next).to_vec();
        ram.write(1);
        ram.check().unwrap();
        ram.memory.page_mut(next).copy_from_slice(&old);
        assert!(ram.check().unwrap_err().to_string().contains("instead of"));
    }
}

//! Aligned tables: columns as wide as their widest cell, two spaces between, no trailing spaces.

use crate::style::{Style, Tone};

/// On which side a column's cells stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// One cell.
#[derive(Debug, Clone)]
pub struct Cell {
    text: String,
    tone: Tone,
}

impl Cell {
    /// A cell that stands out.
    pub fn toned(text: impl Into<String>, tone: Tone) -> Cell {
        Cell { text: text.into(), tone }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Cell {
        Cell { text: text.into(), tone: Tone::Plain }
    }
}

/// A table being made. Every row has as many cells as there are columns; text below a row belongs to it.
pub struct Table<const N: usize> {
    columns: [(&'static str, Side); N],
    rows: Vec<([Cell; N], String)>,
}

impl<const N: usize> Table<N> {
    /// A table with these headings.
    pub fn new(columns: [(&'static str, Side); N]) -> Table<N> {
        Table { columns, rows: Vec::new() }
    }

    /// Adds a row, and whole lines to stand below it.
    pub fn row(&mut self, cells: [Cell; N], below: String) {
        self.rows.push((cells, below));
    }

    /// The text, each line ended.
    pub fn render(&self, style: Style) -> String {
        let mut widths = self.columns.map(|(heading, _)| heading.chars().count());
        for (cells, _) in &self.rows {
            for (width, cell) in widths.iter_mut().zip(cells) {
                *width = (*width).max(cell.text.chars().count());
            }
        }
        let line = |cells: &[Cell]| {
            let mut line = String::new();
            for (i, (cell, width)) in cells.iter().zip(widths).enumerate() {
                let padding = " ".repeat(width - cell.text.chars().count());
                let gap = if i == 0 { "" } else { "  " };
                let painted = style.paint(cell.tone, &cell.text);
                match self.columns[i].1 {
                    Side::Right => line.extend([gap, &padding, &painted]),
                    Side::Left if i + 1 == N => line.extend([gap, &painted]),
                    Side::Left => line.extend([gap, &painted, &padding]),
                }
            }
            format!("{}\n", line.trim_end())
        };
        let mut out = line(&self.columns.map(|(heading, _)| Cell::toned(heading, Tone::Bold)));
        for (cells, below) in &self.rows {
            out.push_str(&line(cells));
            out.push_str(below);
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aligned() {
        let mut table = Table::new([("NAME", Side::Left), ("N", Side::Right), ("END", Side::Left)]);
        table.row(["a".into(), "1000".into(), "x".into()], "  below\n".into());
        table.row(["longer".into(), "1".into(), "".into()], String::new());
        assert_eq!(table.render(Style::plain()), "NAME       N  END\na       1000  x\n  below\nlonger     1\n");
    }
}

package main

import (
	"encoding/json"
	"io"
	"os"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/term"
	"golang.org/x/text/width"
)

// output is where commands write: what they found to out, everything else to err.
type output struct{ out, err io.Writer }

// formatFlag chooses between a table and JSON.
type formatFlag struct {
	Output string `short:"o" enum:"auto,table,json" default:"auto" help:"table, json, or auto: a table on a terminal and JSON elsewhere."`
}

// write writes value as JSON or rows as a table, the first row being the head.
func (o output) write(format formatFlag, value any, rows [][]string) error {
	if !o.table(format) {
		encoder := json.NewEncoder(o.out)
		encoder.SetIndent("", "  ")
		encoder.SetEscapeHTML(false)
		return encoder.Encode(value)
	}
	var widths []int // of all columns that another one follows
	for _, row := range rows {
		for i, cell := range row {
			row[i] = oneLine.Replace(printable(cell))
			if i == len(widths) {
				widths = append(widths, 0)
			}
			if i < len(row)-1 {
				widths[i] = max(widths[i], columns(row[i]))
			}
		}
	}
	var table strings.Builder
	for _, row := range rows {
		for i, cell := range row {
			table.WriteString(cell)
			if i < len(row)-1 {
				table.WriteString(strings.Repeat(" ", widths[i]-columns(cell)+3))
			}
		}
		table.WriteString("\n")
	}
	_, err := io.WriteString(o.out, table.String())
	return err
}

// columns is how many a terminal needs for the text: two for a Chinese character, none for an accent by itself.
func columns(s string) int {
	n := 0
	for _, r := range s {
		switch kind := width.LookupRune(r).Kind(); {
		case unicode.In(r, unicode.Mn, unicode.Me, unicode.Cf):
		case kind == width.EastAsianWide || kind == width.EastAsianFullwidth:
			n += 2
		default:
			n++
		}
	}
	return n
}

// oneLine keeps a cell of a table in its row.
var oneLine = strings.NewReplacer("\n", " ", "\t", " ")

// printable is text that came from elsewhere, such as a foreign message's id, so that it does nothing to the terminal but
// break lines.
func printable(text string) string {
	return strings.Map(func(r rune) rune {
		if r != '\n' && r != '\t' && !strconv.IsPrint(r) {
			return '\ufffd'
		}
		return r
	}, text)
}

func (o output) table(format formatFlag) bool {
	if format.Output != "auto" {
		return format.Output == "table"
	}
	file, ok := o.out.(*os.File)
	return ok && term.IsTerminal(int(file.Fd()))
}

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"

	"golang.org/x/term"
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
	columns := tabwriter.NewWriter(o.out, 0, 0, 3, ' ', 0)
	for _, row := range rows {
		for i, cell := range row {
			if i > 0 {
				fmt.Fprint(columns, "\t")
			}
			fmt.Fprint(columns, oneLine.Replace(printable(cell)))
		}
		fmt.Fprintln(columns)
	}
	return columns.Flush()
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

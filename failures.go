package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	"takeout/domain"
	"takeout/ports/httpapi"
)

// failuresCmd are the commands that show and repair what consumers gave up, over the HTTP API of a running takeout.
type failuresCmd struct {
	List    failuresListCmd    `cmd:"" help:"List failures, newest first."`
	Groups  failuresGroupsCmd  `cmd:"" help:"Count failures by handler and error."`
	Show    failuresShowCmd    `cmd:"" help:"Show a failure, its message and who did what with it."`
	Retry   failuresRetryCmd   `cmd:"" help:"Try to handle messages once more: those with these ids, or those that the filter chooses."`
	Edit    failuresEditCmd    `cmd:"" help:"Send a corrected message in place of one that failed."`
	Discard failuresDiscardCmd `cmd:"" help:"Close failures whose messages need not be handled."`
}

// failureFilter are the flags that choose failures.
type failureFilter struct {
	Handler string `help:"Only of this handler, which is a queue's name."`
	Class   string `help:"Only of this class: permanent, transient, undeliverable."`
	Code    string `help:"Only with this error code."`
	Order   string `help:"Only of this order."`
	Since   when   `help:"Only what failed since this time: RFC 3339, or as long ago as 2h."`
	Until   when   `help:"Only what failed before this time: RFC 3339, or as long ago as 10m."`
	Text    string `help:"Only with this text in the error, the message id or the message."`
}

// values are the filter's names in the API, with what is asked for.
func (f failureFilter) values() map[string]string {
	all := map[string]string{
		"handler": f.Handler, "class": f.Class, "code": f.Code, "order_id": f.Order, "text": f.Text,
		"since": f.Since.String(), "until": f.Until.String(),
	}
	for name, value := range all {
		if value == "" {
			delete(all, name)
		}
	}
	return all
}

// when is a time, or how long ago it was.
type when struct{ time.Time }

// UnmarshalText implements encoding.TextUnmarshaler.
func (w *when) UnmarshalText(text []byte) error {
	if ago, err := time.ParseDuration(string(text)); err == nil && ago >= 0 {
		w.Time = time.Now().Add(-ago)
		return nil
	}
	var err error
	if w.Time, err = time.Parse(time.RFC3339, string(text)); err != nil {
		return fmt.Errorf("must be a time such as 2026-01-02T15:04:05Z, or how long ago such as 90m")
	}
	return nil
}

// String returns the time for the API, empty if there is none.
func (w when) String() string {
	if w.IsZero() {
		return ""
	}
	return w.UTC().Format(time.RFC3339Nano)
}

// failureQuery is what list and groups ask for.
type failureQuery struct {
	client
	failureFilter
	State string `default:"open" enum:"open,retrying,resolved,discarded,replaced,any" help:"Only in this state: open, retrying, resolved, discarded, replaced or any."`
	Limit int    `default:"50" help:"The most lines to show (1 to 200)."`
}

func (q failureQuery) path(below string) (string, error) {
	if q.Limit < 1 || q.Limit > 200 {
		return "", usage(fmt.Errorf("--limit: must be between 1 and 200"))
	}
	values := url.Values{"limit": {strconv.Itoa(q.Limit)}, "state": {q.State}}
	for name, value := range q.values() {
		values.Set(name, value)
	}
	return "/v1/failures" + below + "?" + values.Encode(), nil
}

type failuresListCmd struct {
	failureQuery
	Cursor string `help:"next_cursor of the page before."`
}

// Run lists a page of failures.
func (c *failuresListCmd) Run(out output) error {
	path, err := c.path("")
	if err != nil {
		return err
	}
	if c.Cursor != "" {
		path += "&cursor=" + url.QueryEscape(c.Cursor)
	}
	var page httpapi.FailureListBody
	if err := c.call(context.Background(), http.MethodGet, path, nil, "", &page); err != nil {
		return err
	}
	if err := out.failures(c.formatFlag, page, page.Items...); err != nil {
		return err
	}
	out.unavailable(page.Unavailable)
	if page.NextCursor != "" && out.table(c.formatFlag) {
		fmt.Fprintf(out.err, "more: takeout failures list --cursor %s (with the same flags)\n", page.NextCursor)
	}
	return nil
}

// failures writes failures as a table, or value as JSON.
func (o output) failures(format formatFlag, value any, failures ...httpapi.FailureBody) error {
	rows := [][]string{{"ID", "HANDLER", "CLASS", "ORDER", "STATE", "SINCE", "TRIES", "ERROR"}}
	for _, f := range failures {
		rows = append(rows, []string{
			f.ID, f.Handler, f.Class, cmp.Or(f.OrderID, "-"), f.State, age(f.FirstFailedAt), strconv.Itoa(f.Attempts), brief(f.Error),
		})
	}
	return o.write(format, value, rows)
}

// unavailable says whose failures are missing.
func (o output) unavailable(services []string) {
	if len(services) > 0 {
		fmt.Fprintf(o.err, "takeout: the failures of %s are missing: the database is away\n", strings.Join(services, ", "))
	}
}

// age is how long ago something was, in one unit.
func age(at time.Time) string {
	d := time.Since(at)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(max(d, 0).Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// brief is text that fits on a line of a table and does nothing to the terminal.
func brief(text string) string {
	const limit = 70
	runes := []rune(strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return ' '
		}
		return r
	}, text))
	if len(runes) > limit {
		return string(runes[:limit-1]) + "…"
	}
	return string(runes)
}

type failuresGroupsCmd struct{ failureQuery }

// Run counts failures.
func (c *failuresGroupsCmd) Run(out output) error {
	path, err := c.path("/groups")
	if err != nil {
		return err
	}
	var groups httpapi.FailureGroupsBody
	if err := c.call(context.Background(), http.MethodGet, path, nil, "", &groups); err != nil {
		return err
	}
	out.unavailable(groups.Unavailable)
	return out.write(c.formatFlag, groups, groupRows(groups.Items))
}

func groupRows(groups []httpapi.FailureGroupBody) [][]string {
	rows := [][]string{{"COUNT", "HANDLER", "CLASS", "CODE", "FIRST", "LAST", "EXAMPLE", "ERROR"}}
	for _, g := range groups {
		rows = append(rows, []string{strconv.Itoa(g.Count), g.Handler, g.Class, g.Code, age(g.First), age(g.Last), g.Example, brief(g.Error)})
	}
	return rows
}

type failuresShowCmd struct {
	client
	ID string `arg:"" help:"The failure's id, such as dispatch-17."`
}

// Run shows a failure.
func (c *failuresShowCmd) Run(out output) error {
	var f httpapi.FailureDetailBody
	if err := c.call(context.Background(), http.MethodGet, "/v1/failures/"+url.PathEscape(c.ID), nil, "", &f); err != nil {
		return err
	}
	rows := [][]string{
		{"ID", f.ID}, {"STATE", f.State}, {"HANDLER", f.Handler}, {"ORDER", cmp.Or(f.OrderID, "-")}, {"ERROR", f.Class + ", " + f.Code + ": " + f.Error},
		{"TRIES", fmt.Sprintf("%d (given up %d ×)", f.Attempts, f.Occurrences)},
		{"FAILED", f.FirstFailedAt.Format(time.RFC3339) + ", last " + f.LastFailedAt.Format(time.RFC3339)}, {"MESSAGE", f.MessageID},
	}
	if f.ClosedAt != nil {
		rows = append(rows, []string{"CLOSED", f.ClosedAt.Format(time.RFC3339)})
	}
	if f.ReplacedBy != "" {
		rows = append(rows, []string{"REPLACED BY", f.ReplacedBy})
	}
	for _, name := range slices.Sorted(maps.Keys(f.Headers)) {
		rows = append(rows, []string{"HEADER", name + ": " + f.Headers[name]})
	}
	for _, a := range f.Actions {
		rows = append(rows, []string{"ACTION", a.At.Format(time.RFC3339) + " " + a.Action + " by " + a.Operator + ": " + cmp.Or(a.Reason, "no reason given")})
	}
	if err := out.write(c.formatFlag, f, rows); err != nil {
		return err
	}
	if !out.table(c.formatFlag) {
		return nil
	}
	more := ""
	if f.PayloadTruncated {
		more = ", the first part; the rest is at /v1/failures/" + f.ID + "/payload"
	}
	payload := f.Payload
	var indented bytes.Buffer
	if json.Indent(&indented, []byte(payload), "", "  ") == nil {
		payload = indented.String()
	}
	_, err := fmt.Fprintf(out.out, "\nPAYLOAD (%d bytes, %s%s)\n%s\n", f.PayloadSize, f.PayloadEncoding, more, printable(payload))
	return err
}

// actor are the flags of commands that change something.
type actor struct {
	client
	Operator string `env:"TAKEOUT_OPERATOR" help:"Who does this, for the record; the user's name if absent."`
}

// act sends what somebody does.
func (a *actor) act(path string, body, answer any) error {
	a.operator = a.Operator
	if a.operator == "" {
		a.operator = "unknown"
		if who, err := user.Current(); err == nil {
			a.operator = who.Username
		}
	}
	if err := domain.CheckName("--operator", a.operator, 64); err != nil {
		return usage(err)
	}
	return a.call(context.Background(), http.MethodPost, "/v1/failures"+path, body, "", answer)
}

// actOnEach does one thing with each of the failures, and stops where it fails.
func (a *actor) actOnEach(out output, ids []string, action string, body any) error {
	var changed []httpapi.FailureBody
	var failed error
	for _, id := range ids {
		var f httpapi.FailureBody
		if failed = a.act("/"+url.PathEscape(id)+"/"+action, body, &f); failed != nil {
			break
		}
		changed = append(changed, f)
	}
	if len(changed) > 0 {
		if err := out.failures(a.formatFlag, changed, changed...); err != nil {
			return err
		}
	}
	return failed
}

// defaultRetryRate is what the flag says.
const defaultRetryRate = 10

type failuresRetryCmd struct {
	actor
	failureFilter
	IDs           []string `arg:"" optional:"" name:"id" help:"Ids of failures, such as dispatch-17, which are retried at once; without, the filter chooses."`
	All           bool     `help:"Every open failure."`
	DryRun        bool     `name:"dry-run" help:"Only show what the filter chooses. That is what happens without --yes, too."`
	Yes           bool     `help:"Retry all that the filter chooses."`
	Rate          int      `default:"10" help:"How many are retried in a second (1 to 1000)."`
	StopOnFailure bool     `name:"stop-on-failure" help:"When one fails again, do not retry the rest."`
	Limit         int      `default:"1000" help:"The most failures to retry, the oldest first (1 to 10000)."`
	Reason        string   `help:"Why, for the record."`
}

// Run retries, or shows what it would retry.
func (c *failuresRetryCmd) Run(out output) error {
	filter := c.values()
	switch {
	case c.Limit < 1 || c.Limit > 10_000:
		return usage(fmt.Errorf("--limit: must be between 1 and 10000"))
	case c.Rate < 1 || c.Rate > 1000:
		return usage(fmt.Errorf("--rate: must be between 1 and 1000"))
	case len(c.IDs) > 0 && (len(filter) > 0 || c.All || c.DryRun):
		return usage(fmt.Errorf("give either ids or a filter; --dry-run works with a filter only"))
	case len(c.IDs) > 0 && (c.StopOnFailure || c.Rate != defaultRetryRate):
		return usage(fmt.Errorf("what is named by its id is retried at once; --rate and --stop-on-failure work with a filter only"))
	case len(c.IDs) > 0:
		return c.actOnEach(out, c.IDs, "retry", map[string]any{"reason": c.Reason})
	case len(filter) == 0 && !c.All:
		return usage(fmt.Errorf("say which failures: ids, a filter such as --handler, or --all"))
	case c.DryRun && c.Yes:
		return usage(fmt.Errorf("say either --dry-run or --yes"))
	}
	var retried httpapi.RetriedBody
	err := c.act("/retry", map[string]any{
		"filter": filter, "all": c.All, "dry_run": !c.Yes, "rate_per_second": c.Rate, "stop_on_failure": c.StopOnFailure,
		"limit": c.Limit, "reason": c.Reason,
	}, &retried)
	if err != nil {
		return err
	}
	return c.report(out, retried)
}

func (c *failuresRetryCmd) report(out output, retried httpapi.RetriedBody) error {
	out.unavailable(retried.Unavailable)
	rows := groupRows(retried.Groups)
	if !retried.DryRun {
		rows = [][]string{{"RETRYING"}}
		for _, id := range retried.IDs {
			rows = append(rows, []string{id})
		}
	}
	if err := out.write(c.formatFlag, retried, rows); err != nil {
		return err
	}
	if len(retried.TooLarge) > 0 {
		fmt.Fprintf(out.err, "takeout: too large to be retried, and left open: %s\n", strings.Join(retried.TooLarge, " "))
	}
	if retried.DryRun {
		fmt.Fprintf(out.err, "this would retry %d failures; nothing is done without --yes\n", min(retried.Count, c.Limit))
		return nil
	}
	fmt.Fprintf(out.err, "%d failures are being retried; takeout failures list --state any shows what becomes of them\n", retried.Count)
	return nil
}

type failuresEditCmd struct {
	actor
	ID          string `arg:"" help:"The failure's id, such as dispatch-17."`
	DataFile    string `name:"data-file" xor:"what" help:"File with the event's new data, a JSON object; - is standard input."`
	PayloadFile string `name:"payload-file" xor:"what" help:"File with the whole new event, CloudEvents JSON; - is standard input."`
	Reason      string `help:"Why, for the record."`
}

// Run sends a corrected message.
func (c *failuresEditCmd) Run(out output) error {
	if c.DataFile+c.PayloadFile == "" {
		return usage(fmt.Errorf("say --data-file FILE with the event's new data, or --payload-file FILE with the whole event"))
	}
	text, err := readFile(c.DataFile + c.PayloadFile)
	if err != nil {
		return usage(err)
	}
	body := map[string]any{"reason": c.Reason, "payload": string(text)}
	if c.DataFile != "" {
		if !json.Valid(text) {
			return usage(fmt.Errorf("--data-file: %s is not JSON", c.DataFile))
		}
		body = map[string]any{"reason": c.Reason, "data": json.RawMessage(text)}
	}
	var f httpapi.FailureBody
	if err := c.act("/"+url.PathEscape(c.ID)+"/edit", body, &f); err != nil {
		return err
	}
	if err := out.failures(c.formatFlag, f, f); err != nil {
		return err
	}
	fmt.Fprintf(out.err, "%s is replaced by %s\n", f.ID, f.ReplacedBy)
	return nil
}

// readFile reads a file, or standard input for -.
func readFile(path string) ([]byte, error) {
	if path == "-" {
		return io.ReadAll(os.Stdin)
	}
	return os.ReadFile(path)
}

type failuresDiscardCmd struct {
	actor
	IDs    []string `arg:"" name:"id" help:"Ids of failures, such as dispatch-17."`
	Reason string   `required:"" help:"Why the messages need not be handled."`
}

// Run discards failures.
func (c *failuresDiscardCmd) Run(out output) error {
	if err := domain.CheckName("--reason", c.Reason, 500); err != nil {
		return usage(err)
	}
	return c.actOnEach(out, c.IDs, "discard", map[string]any{"reason": c.Reason})
}

package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"takeout/app/reconcile"
	"takeout/service"
)

// exitUnknown says that it could not be told whether the services agree.
const exitUnknown = 2

type reconcileCmd struct {
	service.Config
	formatFlag
	Repair bool          `help:"Repair what differs, up to --reconcile-budget. Amounts are never repaired."`
	From   time.Time     `help:"Only orders placed from then on: 2026-01-02T15:04:05Z."`
	To     time.Time     `help:"Only orders placed before then."`
	Full   bool          `help:"Everything, whether it was compared before or not."`
	Wait   time.Duration `default:"30s" help:"With --repair, how long to wait for repairs to show."`
}

// Run compares. It exits with 0 if the services agree, with 1 if they do not, and with 2 if that cannot be told.
func (c *reconcileCmd) Run(out output) error {
	request := reconcile.Request{Repair: c.Repair, From: c.From, To: c.To, Full: c.Full}
	if err := errors.Join(c.Validate(), request.Check(time.Now())); err != nil {
		return usage(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	report, err := service.Reconcile(ctx, c.Config, request, c.Wait, newLogger(c.Config, out.err))
	if err != nil {
		return exitError{err, exitUnknown}
	}
	if err := out.write(c.formatFlag, report, reportRows(report)); err != nil {
		return err
	}
	switch {
	case len(report.Errors) > 0:
		return exitError{errors.New("not everything could be compared"), exitUnknown}
	case !report.Agree():
		return exitError{errors.New(""), exitFailed}
	}
	return nil
}

func reportRows(r reconcile.Report) [][]string {
	rows := [][]string{{"CLASS", "ORDER", "STATE", "REPAIR"}}
	for _, f := range r.Findings {
		repair := f.Repair
		if f.State == reconcile.StatePerson && repair == "" {
			repair = amounts(f)
		}
		rows = append(rows, []string{f.Class, f.OrderID, f.State, repair})
	}
	for _, e := range r.Errors {
		rows = append(rows, []string{"error", e, "", ""})
	}
	verdict := "the services differ"
	switch {
	case r.Agree():
		verdict = "the services agree"
	case len(r.Errors) > 0:
		verdict = "it cannot be told whether the services agree"
	}
	rows = append(rows, []string{})
	if r.Failures > 0 {
		rows = append(rows, []string{fmt.Sprintf("%d wait for failures; takeout failures list shows them", r.Failures)})
	}
	return append(rows, []string{fmt.Sprintf("%s, for orders placed until %s: %d orders compared, %d of %d minutes equal, %d in flight, %d repaired, %d waiting, %d for a person; %s",
		verdict, r.To.Format(time.RFC3339), r.Compared.Orders, r.Compared.Equal, r.Compared.Buckets, r.InFlight, r.Repaired, r.Waiting, r.Person,
		r.FinishedAt.Sub(r.StartedAt).Round(time.Millisecond))})
}

// amounts says what each service's tables have as the order's amount, for who must decide which of them is right.
func amounts(f reconcile.Finding) string {
	var all []string
	for _, service := range slices.Sorted(maps.Keys(f.Evidence)) {
		for _, r := range f.Evidence[service] {
			if r.Currency != "" {
				all = append(all, fmt.Sprintf("%s has %d %s", service, r.Amount, r.Currency))
			}
		}
	}
	return strings.Join(all, ", ")
}

package main

import (
	"testing"

	"github.com/stretchr/testify/require"

	"takeout/app/reconcile"
)

func TestReportShowsTheAmountsThatAPersonHasToSettle(t *testing.T) {
	record := func(amount int64) []reconcile.Record { return []reconcile.Record{{Amount: amount, Currency: "CNY"}} }
	rows := reportRows(reconcile.Report{Findings: []reconcile.Finding{
		{Class: "amount_mismatch", OrderID: "o", State: reconcile.StatePerson, Evidence: map[string][]reconcile.Record{"order": record(100), "dispatch": record(500)}},
		{Class: "missing", OrderID: "p", State: reconcile.StatePerson, Repair: "none is possible", Evidence: map[string][]reconcile.Record{"order": record(100)}},
		{Class: "missing", OrderID: "q", State: reconcile.StateOpen, Evidence: map[string][]reconcile.Record{"order": record(100)}},
	}})
	require.Equal(t, [][]string{
		{"amount_mismatch", "o", "person", "dispatch has 500 CNY, order has 100 CNY"},
		{"missing", "p", "person", "none is possible"},
		{"missing", "q", "open", ""},
	}, rows[1:4])
}

package model

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func explore(t *testing.T, s Setting) Result {
	t.Helper()
	s.Orders, s.Relays = max(s.Orders, 1), max(s.Relays, 1)
	began := time.Now()
	r, err := Explore(s)
	require.NoError(t, err)
	t.Logf("%v: %v", time.Since(began).Round(time.Millisecond), r)
	return r
}

func TestProtocolKeepsItsPromisesWhateverFailsInWhateverOrder(t *testing.T) {
	t.Parallel()
	for name, s := range map[string]Setting{
		"nothing fails":                                    {},
		"two crashes":                                      {Faults: Faults{Crashes: 2}},
		"a crash, and nothing is reconciled":               {NoReconciler: true, Faults: Faults{Crashes: 1}},
		"orders are brought, and nothing is reconciled":    {NoReconciler: true, Delivers: true},
		"couriers have no room, and nothing is reconciled": {NoReconciler: true, NoRoom: true},
		"answers to COMMIT are lost":                       {Faults: Faults{LostAnswers: 2, Crashes: 1}},
		"attempts fail":                                    {Faults: Faults{Failures: 3}},
		"an attempt fails, and a process dies":             {Faults: Faults{Failures: 1, Crashes: 1}},
		"the reconciler does not wait":                     {Faults: Faults{Hasty: 1, Crashes: 1}},
		"clients ask again":                                {Again: true, Faults: Faults{Crashes: 1}},
		"orders are brought":                               {Delivers: true, Faults: Faults{Crashes: 1}},
		"couriers have no room":                            {NoRoom: true, Faults: Faults{Crashes: 1}},
		"two relays, and a lease that ends":                {Relays: 2, Faults: Faults{Expiries: 1}},
		"two relays, a lease that ends, and a crash":       {Relays: 2, NoCancel: true, Faults: Faults{Expiries: 1, Crashes: 1}},
		"two orders":                                       {Orders: 2},
		"two orders, and a crash":                          {Orders: 2, NoCancel: true, Faults: Faults{Crashes: 1}},
		"failover":                                         {Faults: Faults{Failovers: 1}},
		"two failovers":                                    {Faults: Faults{Failovers: 2}},
		"failover, and a crash":                            {Faults: Faults{Failovers: 1, Crashes: 1}},
		"failover of the dispatch database":                {DispatchFails: true, Faults: Faults{Failovers: 1}},
		"failover of the dispatch database, and a crash":   {DispatchFails: true, NoCancel: true, Faults: Faults{Failovers: 1, Crashes: 1}},
		"failover of the dispatch database, and couriers have no room": {DispatchFails: true, NoRoom: true, Faults: Faults{Failovers: 1}},
		"failover, and the reconciler does not wait":                   {NoCancel: true, Faults: Faults{Failovers: 1, Hasty: 1}},
		"failover, and clients ask again":                              {Again: true, Faults: Faults{Failovers: 1}},
		"failover, and orders are brought":                             {Delivers: true, Faults: Faults{Failovers: 1}},
		"failover, and couriers have no room":                          {NoRoom: true, Faults: Faults{Failovers: 1}},
		"legacy":                                                       {Legacy: true},
		"legacy, and a crash":                                          {Legacy: true, Faults: Faults{Crashes: 1}},
		"legacy, and failover":                                         {Legacy: true, Faults: Faults{Failovers: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			require.Empty(t, explore(t, s).Violation)
		})
	}
}

func TestDefectIsFoundUnlessSomethingElseMakesUpForIt(t *testing.T) {
	t.Parallel()
	crash, failover := Faults{Crashes: 1}, Faults{Failovers: 1}
	for name, c := range map[string]struct {
		want string // the invariant that is violated, empty if none is
		Setting
	}{
		"neither inbox nor key":                       {"I3", Setting{Faults: crash, Defects: Defects{NoInbox: true, NoKey: true}}},
		"no key":                                      {"I5", Setting{Defects: Defects{NoKey: true}}},
		"no inbox, but keys":                          {"", Setting{Faults: crash, Defects: Defects{NoInbox: true}}},
		"inbox row apart":                             {"I1", Setting{NoReconciler: true, Faults: crash, Defects: Defects{InboxApart: true}}},
		"inbox row apart, reconciled":                 {"", Setting{Faults: crash, Defects: Defects{InboxApart: true}}},
		"ack before COMMIT":                           {"I1", Setting{NoReconciler: true, Faults: crash, Defects: Defects{AckFirst: true}}},
		"ack before COMMIT, reconciled":               {"", Setting{Faults: crash, Defects: Defects{AckFirst: true}}},
		"delete before confirm":                       {"I1", Setting{NoReconciler: true, Faults: crash, Defects: Defects{DeleteFirst: true}}},
		"delete before confirm, reconciled":           {"", Setting{Faults: crash, Defects: Defects{DeleteFirst: true}}},
		"no outbox":                                   {"I1", Setting{NoReconciler: true, Faults: crash, Defects: Defects{NoOutbox: true}}},
		"no outbox, reconciled":                       {"", Setting{Faults: crash, Defects: Defects{NoOutbox: true}}},
		"cancelled rows are deleted":                  {"I5", Setting{Defects: Defects{DeleteCancelled: true}}},
		"failover without reconciler":                 {"I2", Setting{NoReconciler: true, Faults: failover}},
		"failover, nobody gives a message up":         {"", Setting{NoDiscard: true, Faults: failover}},
		"cancellation unheard, failover":              {"I2", Setting{NoReconciler: true, Faults: failover, Defects: Defects{CancelUnheard: true}}},
		"compensation does not wait for transactions": {"", Setting{Legacy: true, Defects: Defects{PlainRead: true}}},
		"retries go to everybody":                     {"I10", Setting{Faults: Faults{Failures: 1}, Defects: Defects{RetryForEverybody: true}}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			violation := explore(t, c.Setting).Violation
			if c.want == "" {
				require.Empty(t, violation)
				return
			}
			require.Contains(t, violation, c.want+":")
		})
	}
}

package tests

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// layer says what packages of a part of the tree may import of this module, and of others.
type layer struct {
	path    string   // the package and those below it
	own     []string // of this module, with those below
	foreign []string // of other modules, with those below; nil for any
}

// layers is the dependency rule: everything points to the domain, and the first layer that fits a package counts.
var layers = []layer{
	{path: "takeout/domain/event", own: []string{"takeout/domain"}, foreign: []string{"github.com/go-json-experiment/json"}}, // encoding/json reads what is ambiguous
	{path: "takeout/domain", own: []string{"takeout/domain"}, foreign: []string{}},
	{path: "takeout/crashpoint", own: []string{}, foreign: []string{}},
	{path: "takeout/app", own: []string{"takeout/app", "takeout/domain", "takeout/crashpoint"}, foreign: []string{}},
	{path: "takeout/ports/messaging", own: []string{"takeout/app", "takeout/domain", "takeout/crashpoint"},
		foreign: []string{"github.com/ThreeDotsLabs/watermill", "github.com/prometheus/client_golang"}},
	{path: "takeout/ports/httpapi", own: []string{"takeout/app", "takeout/domain"},
		foreign: []string{"github.com/danielgtaylor/huma", "github.com/go-json-experiment/json", "github.com/google/uuid", "github.com/swaggest/swgui"}},
	{path: "takeout/adapters/sqldb", own: []string{"takeout/domain", "takeout/crashpoint"}},
	{path: "takeout/adapters/sqlqueue", own: []string{"takeout/app", "takeout/domain", "takeout/crashpoint", "takeout/adapters/sqldb"}},
	// The two that keep tables stand on the two above; no adapter knows another one beside it.
	{path: "takeout/adapters/sqlstore", own: []string{"takeout/app", "takeout/domain", "takeout/crashpoint", "takeout/adapters/sqldb", "takeout/adapters/sqlqueue"}},
	{path: "takeout/adapters/sqlbroker", own: []string{"takeout/app", "takeout/domain", "takeout/crashpoint", "takeout/adapters/sqldb", "takeout/adapters/sqlqueue"}},
	{path: "takeout/adapters/simgateway", own: []string{"takeout/app", "takeout/domain", "takeout/adapters/sqldb"}}, // a stranger who is lent a database
	{path: "takeout/adapters/rabbitmq", own: []string{"takeout/app", "takeout/domain", "takeout/crashpoint"}},
	{path: "takeout/service", own: []string{"takeout/adapters", "takeout/ports", "takeout/app", "takeout/domain", "takeout/crashpoint"}},
	// What verifies the program sees it from outside: it knows the words of its ports and tables, and not its wiring.
	{path: "takeout/verify/history", own: []string{"takeout/domain"}, foreign: []string{}},
	{path: "takeout/verify/servers", own: []string{"takeout/verify/servers"}},
	{path: "takeout/verify/proxy", own: []string{}},
	{path: "takeout/verify", own: []string{"takeout/verify", "takeout/app", "takeout/domain", "takeout/crashpoint", "takeout/ports/messaging", "takeout/adapters"}},
	{path: "takeout/bench", own: []string{"takeout"}},                                                 // measures every part
	{path: "takeout/tests/testenv", own: []string{"takeout/tests/testenv", "takeout/verify/servers"}}, // knows servers, not this program
	{path: "takeout/tests", own: []string{"takeout"}},
}

type goPackage struct {
	ImportPath string
	Imports    []string
	Standard   bool
}

func TestPackagesImportOnlyWhatTheirLayerMay(t *testing.T) {
	t.Parallel()
	command := exec.Command("go", "list", "-json=ImportPath,Imports,Standard", "-deps", "takeout/...")
	out, err := command.Output()
	require.NoError(t, err)
	var packages []goPackage
	for decoder := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		err := decoder.Decode(&p)
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		packages = append(packages, p)
	}
	require.Empty(t, violations(packages))
}

func TestDependencyRuleCatchesAViolation(t *testing.T) {
	t.Parallel()
	std := goPackage{ImportPath: "database/sql", Standard: true}
	for _, broken := range []goPackage{
		{ImportPath: "takeout/domain/order", Imports: []string{"takeout/app"}},
		{ImportPath: "takeout/domain/order", Imports: []string{"github.com/google/uuid"}},
		{ImportPath: "takeout/app", Imports: []string{"takeout/adapters/sqlstore"}},
		{ImportPath: "takeout/app", Imports: []string{"database/sql"}},
		{ImportPath: "takeout/app", Imports: []string{"github.com/ThreeDotsLabs/watermill/message"}},
		{ImportPath: "takeout/ports/httpapi", Imports: []string{"takeout/adapters/sqlstore"}},
		{ImportPath: "takeout/adapters/rabbitmq", Imports: []string{"takeout/adapters/sqldb"}},
		{ImportPath: "takeout/adapters/sqlstore", Imports: []string{"takeout/ports/messaging"}},
		{ImportPath: "takeout/adapters/redis", Imports: nil}, // a package that no layer describes
	} {
		require.NotEmpty(t, violations([]goPackage{broken, std}), "%s importing %s", broken.ImportPath, broken.Imports)
	}
}

// violations lists the imports that the layers do not allow.
func violations(packages []goPackage) []string {
	standard := map[string]bool{}
	for _, p := range packages {
		standard[p.ImportPath] = p.Standard
	}
	var found []string
	for _, p := range packages {
		if p.ImportPath != "takeout" && !strings.HasPrefix(p.ImportPath, "takeout/") || p.ImportPath == "takeout" {
			continue // main may know everybody
		}
		i := slices.IndexFunc(layers, func(l layer) bool { return isBelow(p.ImportPath, l.path) })
		if i < 0 {
			found = append(found, p.ImportPath+" belongs to no layer of tests/arch_test.go")
			continue
		}
		for _, imported := range p.Imports {
			var allowed bool
			switch l := layers[i]; {
			case strings.HasPrefix(imported, "takeout/"):
				allowed = slices.ContainsFunc(l.own, func(path string) bool { return isBelow(imported, path) })
			case standard[imported]:
				// The standard library holds technologies too.
				allowed = !(isBelow(p.ImportPath, "takeout/domain") || isBelow(p.ImportPath, "takeout/app")) ||
					!isBelow(imported, "database") && !isBelow(imported, "net")
			default:
				allowed = l.foreign == nil || slices.ContainsFunc(l.foreign, func(path string) bool { return isBelow(imported, path) })
			}
			if !allowed {
				found = append(found, fmt.Sprintf("%s imports %s", p.ImportPath, imported))
			}
		}
	}
	return found
}

// isBelow reports whether a package is path or below it.
func isBelow(pkg, path string) bool { return pkg == path || strings.HasPrefix(pkg, path+"/") }
